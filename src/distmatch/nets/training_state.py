"""The state of a training between steps: teachers, students, networks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE, Ranks
from distmatch.nets.ema import EMA
from distmatch.nets.optim import moments_to
from distmatch.nets.shared import load_own_state, own_state

_FLAT = ("denoiser", "model", "average", "uncertainty")
"""Networks of teachers and of tokens that version 0.1 saved outside of ``modules``."""
_RENAMED = {"optimiser": "optimizer", "optimisers": "optimizers", "normaliser": "normalizer"}


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a step reads and changes: exactly what a checkpoint holds.

    A training adds its named networks in :meth:`modules`.

    Attributes:
        ema: Moving average of what is trained; what is used and saved.
        optimizers: By the name of what they optimize.
        generator: The random stream of the steps, in the same state on all ranks.
        ranks: The processes that train together; no part of a checkpoint.
        offload: Whether moments are in the memory of the CPU between steps; no part of a checkpoint.
        memory: Tensors by name; what a step replaces is kept here.
        step: Steps done.
    """

    ema: EMA
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator
    ranks: Ranks = ALONE
    offload: bool = False
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return {"average": self.ema.module}

    def tensors(self) -> Iterator[Tensor]:
        """All parameters and buffers of the networks."""
        for module in self.modules().values():
            yield from module.parameters()
            yield from module.buffers()

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors, numbers and strings."""
        return {
            "modules": {name: own_state(module) for name, module in self.modules().items()},
            "average_rest": self.ema.rest_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "memory": dict(self.memory),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restores a state of the same configuration.

        Raises:
            UserError: The networks are others, or of another architecture.
        """
        tree = current(tree)
        mine, theirs = self.modules(), tree["modules"]
        if missing := mine.keys() - theirs.keys():
            raise UserError(
                "the checkpoint belongs to a run of another kind",
                got=f"no network {', '.join(sorted(missing))} among {', '.join(theirs) or 'none'}",
                expected="a checkpoint written by the same command with the same options",
                fix="resume with the options that wrote it: see the config.toml of its run",
            )
        for name, module in mine.items():
            load_own_state(module, theirs[name], f"network '{name}' of the checkpoint")
        self.ema.load_rest(tree.get("average_rest", {}))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(tree["optimizers"][name])
            if self.offload:  # before those of the next one are loaded, on the device of its network
                moments_to(optimizer, torch.device("cpu"))
        device = self.generator.device
        self.memory = {name: tensor.to(device) for name, tensor in tree.get("memory", {}).items()}
        self.generator.set_state(tree["generator"].cpu())
        self.step = tree["step"]


def current(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of a state as today, from one that version 0.1 may have written."""
    tree = {_RENAMED.get(name, name): value for name, value in tree.items()}
    if "modules" in tree:
        return tree
    modules = {name: tree[name] for name in _FLAT if name in tree}
    optimizers = dict.fromkeys(modules, tree.get("optimizer"))
    memory = {"chains": tree["chains"]} if "chains" in tree else {}
    return {**tree, "memory": memory, "modules": modules, "optimizers": optimizers}
