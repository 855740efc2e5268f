"""Training conditionals and marginals: ``state = init(seed)``, then ``info = step(state, ...)``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.files import load_into
from distmatch.base.rules import Count, Decay, Positive, Share
from distmatch.base.seeds import generator, stream_seed
from distmatch.discrete.losses import LOSSES, discrete_loss
from distmatch.discrete.marginals import check_pair, consistency_loss, gibbs_block, reinforce_loss
from distmatch.discrete.network import MarginalNet, TokenNet, TokenNetConfig
from distmatch.discrete.tokens import Conditionals
from distmatch.nets.optim import adam, clipped_step, rate, set_rate
from distmatch.nets.optimizer import OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class TokenTrainingConfig(OptimizerSettings):
    """Settings of all trainings here.

    Attributes:
        loss: Which loss trains the conditionals; k-dce has the least spread of those with
            one evaluation.
        schedule: For the losses in t.
        ema_decay: Of the weight average, with a warm-up of (1 + step) / (10 + step).
        on_policy: For marginals fitted to conditionals: share of a batch that a Gibbs chain of the
            conditionals supplies instead of the data.
        block: Tokens that a Gibbs sweep draws anew.
        consistency: For energies: weight of the consistency loss beside the KL.
        chains: Persistent Gibbs chains, which start at random symbols; for energies they are the batch.
    """

    flags: ClassVar[bool] = False
    lr: Positive = 1e-3
    lr_decay: Literal["constant", "cosine"] = "cosine"
    loss: str = "k-dce"
    schedule: str = "log-linear"
    ema_decay: Decay = 0.995
    on_policy: Share = 0.5
    block: Count = 1
    consistency: float = 1.0
    chains: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise unknown_name("discrete loss", self.loss, LOSSES)
        if self.chains < 2:
            raise UserError("there must be at least 2 Gibbs chains", got=self.chains)


@dataclass
class TokenState:
    """What a checkpoint of a training holds.

    Attributes:
        model: The modules in training.
        average: Their moving average; what is used and saved.
        optimizer: Their optimizer.
        generator: The random stream of the steps.
        chains: Sequences (n, L) of the Gibbs chains; none for conditionals alone.
        step: Steps done.
    """

    model: nn.ModuleDict
    average: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    chains: Tensor
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors, numbers and strings."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
        self.optimizer.load_state_dict(tree["optimizer"])
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
        net = self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "network"))
            model = nn.ModuleDict({name: make() for name, make in modules.items()}).to(self.device)
        random = generator(seed, "tokens", self.device)
        start = torch.randint(net.vocabulary, (chains, net.length), generator=random, device=self.device)
        return TokenState(
            model=model,
            average=copy.deepcopy(model).requires_grad_(False).eval(),
            optimizer=adam(model.parameters(), self.config),
            generator=random,
            chains=start,
        )

    def _descend(self, state: TokenState, loss: Tensor) -> Tensor:
        """Gradient, clipping, learning rate, optimizer, average; returns the gradient's norm."""
        cfg = self.config
        set_rate(state.optimizer, cfg.lr * rate(cfg, state.step, self.total_steps))
        loss.backward()
        norm = clipped_step(state.optimizer, cfg.grad_clip)
        state.step += 1
        decay = min(cfg.ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(state.average.parameters()), list(state.model.parameters()), 1 - decay)
        return norm


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
    """Fits marginals and conditionals to an unnormalized density, with no data: KL(p || f / Z).

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
