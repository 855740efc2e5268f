"""Training conditionals and marginals: ``state = init(seed)``, then ``info = step(state, ...)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_count, check_name
from distmatch.base.rules import Count, Decay, Positive, Share
from distmatch.base.seeds import generator, stream_seed
from distmatch.discrete.losses import LOSSES, discrete_loss
from distmatch.discrete.marginals import check_pair, consistency_loss, gibbs_block, reinforce_loss
from distmatch.discrete.network import NETWORKS, TokenNetConfig
from distmatch.discrete.tokens import Conditionals
from distmatch.nets.ema import EMA
from distmatch.nets.optim import adam, scheduled_step
from distmatch.nets.optimizer import OptimizerSettings
from distmatch.nets.training_state import TrainingState


@dataclass(frozen=True, kw_only=True)
class TokenTrainingConfig(OptimizerSettings):
    """Settings of all trainings here.

    Attributes:
        loss: Which loss trains the conditionals; k-dce has the least spread of those with
            one evaluation.
        schedule: For the losses in t.
        ema_decay: Of the weight average, with a warm-up of (1 + step) / (10 + step).
        on_policy: For marginals fitted to conditionals: share of a batch from a Gibbs chain of the
            conditionals instead of the data.
        block: Tokens that a Gibbs sweep draws anew.
        consistency: For energies: weight of the consistency loss relative to the KL.
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
        check_name("discrete loss", self.loss, LOSSES)
        check_count("chains", self.chains, 2)


@dataclass(kw_only=True)
class TokenState(TrainingState):
    """The training state of a token model, with one optimizer, ``model``.

    Its memory holds ``chains``, the sequences (n, L) of the Gibbs chains; none for conditionals alone.

    Attributes:
        model: The networks in training, by name.
    """

    model: nn.ModuleDict

    def modules(self) -> dict[str, nn.Module]:
        """The networks."""
        return {"model": self.model, **super().modules()}


@dataclass
class TokenTraining:
    """What the three trainings share: ``state = init(seed)``, ``info = step(state, x)``, ``result(state)``.

    Attributes:
        net: Sizes of the networks.
        total_steps: Length of the run, for the learning rate.
        config: The settings.
        device: Device of the networks.
    """

    net: TokenNetConfig
    total_steps: int
    config: TokenTrainingConfig = field(default_factory=TokenTrainingConfig)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trains: ClassVar[tuple[str, ...]]
    """The networks that learn, by their names in :data:`~distmatch.discrete.network.NETWORKS`."""

    def init(self, seed: int) -> TokenState:
        """The state before the first step."""
        net = self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "network"))
            model = nn.ModuleDict({name: NETWORKS[name](net) for name in self.trains}).to(self.device)
        random = generator(seed, "tokens", self.device)
        size = (self.config.chains if "marginals" in self.trains else 0, net.length)
        return TokenState(
            model=model,
            ema=EMA(model),
            optimizers={"model": adam(model.parameters(), self.config)},
            generator=random,
            memory={"chains": torch.randint(net.vocabulary, size, generator=random, device=self.device)},
        )

    def step(self, state: TokenState, x: Tensor) -> dict[str, Tensor]:
        """One step on sequences ``x`` (B, L).

        Args:
            state: From :meth:`init`; it is changed.
            x: Sequences; an energy reads none.

        Returns:
            ``loss``, ``grad_norm``, the norm of its gradient, and what else the training measures.
        """
        cfg = self.config
        loss, info = self.loss(state, x)
        loss.backward()
        info["grad_norm"] = scheduled_step(state.optimizers["model"], cfg, state.step, self.total_steps)
        state.step += 1
        state.ema.update(state.model, min(cfg.ema_decay, (1 + state.step) / (10 + state.step)))
        return info

    def loss(self, state: TokenState, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is descended, and what is logged of it."""
        raise NotImplementedError

    def result(self, state: TokenState) -> Any:
        """The network on its averaged weights; several of them as a ``ModuleDict``."""
        networks: Any = state.ema.module
        return networks if len(self.trains) > 1 else networks[self.trains[0]]


@dataclass
class ConditionalTraining(TokenTraining):
    """Trains a :class:`TokenNet` on whole sequences. ``loss`` is in nats a token."""

    trains = ("conditionals",)

    def loss(self, state: TokenState, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The chosen loss."""
        cfg = self.config
        model: Any = state.model["conditionals"]
        terms = discrete_loss(model, x, cfg.loss, generator=state.generator, schedule=cfg.schedule)
        loss = terms.mean() / self.net.length
        return loss, {"loss": loss.detach()}


@dataclass
class MarginalTraining(TokenTraining):
    """Second stage of maximum likelihood: fits marginals to conditionals that are already trained.

    A share of each batch is replaced by Gibbs chains. ``loss`` is the squared disagreement.

    Attributes:
        conditionals: The result of the first stage, :class:`ConditionalTraining`; not changed.
    """

    conditionals: Conditionals = field(kw_only=True)
    trains = ("marginals",)

    def __post_init__(self) -> None:
        check_pair(self.net, self.conditionals)  # type: ignore[arg-type]

    def loss(self, state: TokenState, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The disagreement with the conditionals."""
        cfg, chains = self.config, state.memory["chains"]
        count = min(round(cfg.on_policy * len(x)), len(chains))
        if count:
            # The chains take turns: no more of them are swept than the batch has use for.
            drawn = gibbs_block(self.conditionals, chains[:count], cfg.block, generator=state.generator)
            state.memory["chains"] = torch.cat([chains[count:], drawn])
            x = torch.cat([x[count:], drawn])
        model: Any = state.model["marginals"]
        loss = consistency_loss(model, _Fixed(self.conditionals), x, generator=state.generator).mean()
        return loss, {"loss": loss.detach()}


@dataclass
class EnergyTraining(TokenTraining):
    """Fits marginals and conditionals to an unnormalized density, with no data: KL(p || f / Z).

    A step sweeps the Gibbs chains once. It measures ``loss`` (the consistency), ``gap`` (mean of log p -
    log f, minus log Z when p = f / Z) and ``gap_std`` (its spread over the chains, 0 when p = f / Z).

    Attributes:
        log_f: Sequences (B, L) -> log f, (B,) in nats.
    """

    log_f: Callable[[Tensor], Tensor] = field(kw_only=True)
    trains = ("conditionals", "marginals")

    def step(self, state: TokenState, x: Tensor | None = None) -> dict[str, Tensor]:
        """One step; ``x`` is not read."""
        return super().step(state, state.memory["chains"])

    def loss(self, state: TokenState, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The KL, as far as its gradient goes, and the consistency."""
        cfg = self.config
        conditionals: Any = state.model["conditionals"]
        marginals: Any = state.model["marginals"]
        x = state.memory["chains"] = gibbs_block(conditionals, x, cfg.block, generator=state.generator)
        surrogate, gap = reinforce_loss(marginals, self.log_f, x)
        agree = consistency_loss(marginals, conditionals, x, generator=state.generator).mean()
        info = {"loss": agree.detach(), "gap": gap.mean(), "gap_std": gap.std()}
        return surrogate + cfg.consistency * agree, info


class _Fixed:
    """Conditionals without gradients."""

    def __init__(self, model: Conditionals) -> None:
        self.model, self.vocabulary, self.length = model, model.vocabulary, model.length

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens)
