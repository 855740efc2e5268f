"""Training conditionals and marginals: ``state = init(seed)``, then ``info = step(state, ...)``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.files import load_into
from distmatch.base.seeds import generator, stream_seed
from distmatch.discrete.losses import LOSSES, discrete_loss
from distmatch.discrete.marginals import check_pair, consistency_loss, gibbs_block, reinforce_loss
from distmatch.discrete.network import MarginalNet, TokenNet, TokenNetConfig
from distmatch.discrete.tokens import Conditionals


@dataclass(frozen=True, kw_only=True)
class TokenTrainingConfig:
    """Settings of all trainings here.

    Attributes:
        loss: Which loss trains the conditionals; k-dce has the least spread of those with
            one evaluation.
        schedule: For the losses in t.
        lr: Learning rate, after the ramp and before the decay.
        lr_rampup: Steps of the linear ramp.
        lr_decay: ``"cosine"`` to zero at the last step, or ``"constant"``.
        beta2: Second momentum of AdamW.
        weight_decay: Of AdamW.
        grad_clip: Largest gradient norm; 0 leaves it alone.
        ema_decay: Of the weight average, with a warm-up of (1 + step) / (10 + step).
        on_policy: For marginals fitted to conditionals: share of a batch that a Gibbs chain of the
            conditionals supplies instead of the data.
        block: Tokens that a Gibbs sweep draws anew.
        consistency: For energies: weight of the consistency loss beside the KL.
        chains: Persistent Gibbs chains, which start at random symbols; for energies they are the batch.
    """

    loss: str = "k-dce"
    schedule: str = "log-linear"
    lr: float = 1e-3
    lr_rampup: int = 100
    lr_decay: Literal["cosine", "constant"] = "cosine"
    beta2: float = 0.99
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.995
    on_policy: float = 0.5
    block: int = 1
    consistency: float = 1.0
    chains: int = 256

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown_name("discrete loss", self.loss, LOSSES)
        if self.lr_decay not in ("cosine", "constant"):
            raise unknown_name("learning-rate decay", self.lr_decay, ("cosine", "constant"))
        if not (0 < self.lr < math.inf and 0 <= self.beta2 < 1 and 0 <= self.ema_decay < 1):
            raise UserError(
                "an optimiser setting is out of range",
                got=f"lr {self.lr}, beta2 {self.beta2}, ema_decay {self.ema_decay}",
                expected="lr > 0, and the other two in [0, 1)",
            )
        if not (0 <= self.on_policy <= 1 and self.block >= 1 and self.chains >= 2):
            raise UserError(
                "a setting of the Gibbs chains is out of range",
                got=f"on_policy {self.on_policy}, block {self.block}, chains {self.chains}",
                expected="on_policy in [0, 1], block >= 1, chains >= 2",
            )


@dataclass
class TokenState:
    """What a checkpoint of a training holds.

    Attributes:
        model: The modules in training.
        average: Their moving average; what is used and saved.
        optimiser: Their optimiser.
        generator: The random stream of the steps.
        chains: Sequences (n, L) of the Gibbs chains; none for conditionals alone.
        step: Steps done.
    """

    model: nn.ModuleDict
    average: nn.ModuleDict
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    chains: Tensor
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors, numbers and strings."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "chains": self.chains,
            "step": self.step,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restores a state of the same configuration.

        Raises:
            UserError: The network is of another architecture.
        """
        load_into(self.model, tree.get("model", {}), "the checkpoint")
        load_into(self.average, tree.get("average", {}), "the checkpoint")
        self.optimiser.load_state_dict(tree["optimiser"])
        self.generator.set_state(tree["generator"].cpu())
        self.chains = tree["chains"].to(self.chains.device)
        self.step = tree["step"]


@dataclass
class _Training:
    """What the three trainings share.

    Attributes:
        net: Sizes of the networks.
        total_steps: Length of the run, for the learning rate.
        config: The settings.
        device: Where the networks live.
    """

    net: TokenNetConfig
    total_steps: int
    config: TokenTrainingConfig = field(default_factory=TokenTrainingConfig)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def _state(self, modules: dict[str, Callable[[], nn.Module]], chains: int, seed: int) -> TokenState:
        cfg, net = self.config, self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "network"))
            model = nn.ModuleDict({name: make() for name, make in modules.items()}).to(self.device)
        random = generator(seed, "tokens", self.device)
        start = torch.randint(net.vocabulary, (chains, net.length), generator=random, device=self.device)
        return TokenState(
            model=model,
            average=copy.deepcopy(model).requires_grad_(False).eval(),
            optimiser=torch.optim.AdamW(
                model.parameters(),
                lr=cfg.lr,
                betas=(0.9, cfg.beta2),
                weight_decay=cfg.weight_decay,
                fused=True,
            ),
            generator=random,
            chains=start,
        )

    def _descend(self, state: TokenState, loss: Tensor) -> Tensor:
        """Gradient, clipping, learning rate, optimiser, average; returns the gradient's norm."""
        cfg = self.config
        factor = min(1.0, (state.step + 1) / cfg.lr_rampup) if cfg.lr_rampup > 0 else 1.0
        if cfg.lr_decay == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * min(state.step / max(self.total_steps, 1), 1.0)))
        for group in state.optimiser.param_groups:
            group["lr"] = cfg.lr * factor
        loss.backward()
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)
        state.optimiser.step()
        state.optimiser.zero_grad(set_to_none=True)
        state.step += 1
        decay = min(cfg.ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(state.average.parameters()), list(state.model.parameters()), 1 - decay)
        return norm.detach()


@dataclass
class ConditionalTraining(_Training):
    """Trains a :class:`TokenNet` on whole sequences; ``state.average["conditionals"]`` is the model."""

    def init(self, seed: int) -> TokenState:
        """The state before the first step."""
        return self._state({"conditionals": lambda: TokenNet(self.net)}, 0, seed)

    def step(self, state: TokenState, x: Tensor) -> dict[str, Tensor]:
        """One step on sequences (B, L); changes ``state``, returns loss (nats a token) and gradient norm."""
        cfg = self.config
        model: Any = state.model["conditionals"]
        terms = discrete_loss(model, x, cfg.loss, generator=state.generator, schedule=cfg.schedule)
        loss = terms.mean() / self.net.length
        return {"loss": loss.detach(), "grad_norm": self._descend(state, loss)}


@dataclass
class MarginalTraining(_Training):
    """Second stage of maximum likelihood: fits marginals to conditionals that are already trained.

    ``state.average["marginals"]`` is the model.

    Attributes:
        conditionals: The result of the first stage, :class:`ConditionalTraining`; not changed.
    """

    conditionals: Conditionals = field(kw_only=True)

    def __post_init__(self) -> None:
        check_pair(self.net, self.conditionals)  # type: ignore[arg-type]

    def init(self, seed: int) -> TokenState:
        """The state before the first step."""
        return self._state({"marginals": lambda: MarginalNet(self.net)}, self.config.chains, seed)

    def step(self, state: TokenState, x: Tensor) -> dict[str, Tensor]:
        """One step on data (B, L), a share of it replaced by Gibbs chains; returns loss, gradient norm."""
        cfg = self.config
        count = min(round(cfg.on_policy * len(x)), len(state.chains))
        if count:
            # The chains take turns: no more of them are swept than the batch has use for.
            next_ones, rest = state.chains[:count], state.chains[count:]
            drawn = gibbs_block(self.conditionals, next_ones, cfg.block, generator=state.generator)
            state.chains = torch.cat([rest, drawn])
            x = torch.cat([x[count:], drawn])
        model: Any = state.model["marginals"]
        loss = consistency_loss(model, _Fixed(self.conditionals), x, generator=state.generator).mean()
        return {"loss": loss.detach(), "grad_norm": self._descend(state, loss)}


@dataclass
class EnergyTraining(_Training):
    """Fits marginals and conditionals to an unnormalised density, with no data: KL(p || f / Z).

    Attributes:
        log_f: Sequences (B, L) -> log f, (B,) in nats.
    """

    log_f: Callable[[Tensor], Tensor] = field(kw_only=True)

    def init(self, seed: int) -> TokenState:
        """The state before the first step."""
        modules: dict[str, Callable[[], nn.Module]] = {
            "conditionals": lambda: TokenNet(self.net),
            "marginals": lambda: MarginalNet(self.net),
        }
        return self._state(modules, self.config.chains, seed)

    def step(self, state: TokenState) -> dict[str, Tensor]:
        """One Gibbs sweep and one gradient step.

        Returns:
            ``loss`` (the consistency), ``gap`` (mean of log p - log f, minus log Z when p = f / Z),
            ``gap_std`` (its spread over the chains, 0 when p = f / Z) and ``grad_norm``.
        """
        cfg = self.config
        conditionals: Any = state.model["conditionals"]
        marginals: Any = state.model["marginals"]
        state.chains = gibbs_block(conditionals, state.chains, cfg.block, generator=state.generator)
        surrogate, gap = reinforce_loss(marginals, self.log_f, state.chains)
        agree = consistency_loss(marginals, conditionals, state.chains, generator=state.generator).mean()
        norm = self._descend(state, surrogate + cfg.consistency * agree)
        return {"loss": agree.detach(), "gap": gap.mean(), "gap_std": gap.std(), "grad_norm": norm}


class _Fixed:
    """Conditionals without gradients."""

    def __init__(self, model: Conditionals) -> None:
        self.model, self.vocabulary, self.length = model, model.vocabulary, model.length

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens)
