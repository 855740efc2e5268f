"""A wrapper as DDP is one: it passes on calls and parameters, and none of the network's methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from distmatch.methods.state import DistillState

DECLARED = ("shape", "num_classes", "sigma_data", "sigma_min", "sigma_max", "has_features", "jumps")
"""What the contracts of denoisers and networks name beside the call."""


class Wrapped(nn.Module):
    """Counts the calls of a network.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0
        for name in DECLARED:
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


Wrap = Callable[[nn.Module], nn.Module]


def wrap(state: DistillState, around: Wrap = Wrapped) -> dict[str, Any]:
    """Puts a wrapper around every network that the state trains; the wrappers by name."""
    student: Any = around(state.student.denoiser)
    found, state.student.denoiser = {"student": student}, student
    if state.fake_score is not None:
        fake: Any = around(state.fake_score)
        found["fake"] = state.fake_score = fake
    if state.discriminator is not None:
        found["ratio"] = state.discriminator = around(state.discriminator)
    return found
