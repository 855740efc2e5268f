"""A small network that guesses log p/q from samples, trained in one call with early stopping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distmatch.base import seeds

_CHUNK = 65_536  # samples a pass when the critic is evaluated
_EVERY = 25  # steps between two looks at the validation part
_PATIENCE = 8  # looks without improvement before training stops

Objective = Callable[[Tensor, Tensor], Tensor]
"""Maps the critic at samples of p and at samples of q to the objective, which is maximized."""


@dataclass(frozen=True)
class Training:
    """How a critic is trained.

    Attributes:
        width: Hidden units in each of the two layers.
        steps: The most steps of each phase of the training.
        batch: Samples of p, and of q, in a step.
        lr: Step size of AdamW.
        weight_decay: Its weight decay.
    """

    width: int = 64
    steps: int = 500
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-2


class Critic(nn.Module):
    """A perceptron with a parallel linear path; zero everywhere before training.

    Args:
        like: Samples (n, d) that give dimension, dtype, device, and the standardization of the inputs.
        width: Hidden units.
        seed: Seed of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, like: Tensor, width: int, seed: int) -> None:
        super().__init__()
        d = like.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.stream_seed(seed, "critic/init"))
            self.inner = nn.Sequential(
                nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
            )
            self.linear = nn.Linear(d, 1)
        for layer in (self.inner[-1], self.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("mean", like.mean(0))
        std = like.std(0)
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))
        self.scale = 1.0
        self.capped = False  # whether held-out samples were too few for a larger scale
        self.blind: str | None = None  # why it may have missed what there is to see
        self.to(device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The guess of log p/q at samples (B, d), as (B,)."""
        x = (x - self.mean) / self.std
        return self.scale * (self.inner(x) + self.linear(x)).squeeze(1)

    @torch.no_grad()
    def at(self, x: Tensor) -> Tensor:
        """The same in float64 for any number of samples, in chunks and without a graph."""
        return torch.cat([self(part).double() for part in x.split(_CHUNK)])


def logistic(on_p: Tensor, on_q: Tensor) -> Tensor:
    """Minus the logistic loss, as a mean over both classes: the objective of a balanced classifier."""
    return -0.5 * (softplus(-on_p).mean() + softplus(on_q).mean())


@torch.enable_grad()
def ascend(
    critic: Critic,
    objective: Objective,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    how: Training,
    batches: torch.Generator,
) -> None:
    """Trains ``critic`` in place and leaves it in its best state on ``validation``, the start included.

    Args:
        critic: The network.
        objective: What to make large.
        train: Samples of p and of q.
        validation: Others, which decide when to stop.
        how: Steps, batch and step size.
        batches: CPU generator of the batches.
    """
    optimizer = torch.optim.AdamW(critic.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    best, best_state, looks = _score(critic, objective, validation), copy.deepcopy(critic.state_dict()), 0
    for step in range(1, how.steps + 1):
        drawn = [
            x[torch.randint(len(x), (min(how.batch, len(x)),), generator=batches).to(x.device)] for x in train
        ]
        loss = -objective(critic(drawn[0]), critic(drawn[1]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % _EVERY == 0 or step == how.steps:
            score = _score(critic, objective, validation)
            looks += 1
            if score > best:
                best, best_state, looks = score, copy.deepcopy(critic.state_dict()), 0
            elif looks >= _PATIENCE:
                break
    critic.load_state_dict(best_state)


def _score(critic: Critic, objective: Objective, samples: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(objective(critic.at(samples[0]), critic.at(samples[1])))


def split(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffles ``x`` and cuts it into training (1/2), validation (1/6) and test (1/3) parts."""
    order = torch.randperm(len(x), generator=generator).to(x.device)
    first, second = len(x) // 2, len(x) // 2 + max(2, len(x) // 6)
    return x[order[:first]], x[order[first:second]], x[order[second:]]
