"""Exponential moving average of the weights of a model."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError


class EMA:
    """A frozen copy of a model whose parameters follow the model's.

    Args:
        model: The model to follow; it is copied and not changed.

    Attributes:
        module: The average, in eval mode and without gradients; use it as any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Sets ``average = decay * average + (1 - decay) * model``; buffers are copied.

        Args:
            model: The model after its step, of the same architecture.
            decay: In [0, 1]; 0 copies the model.
        """
        average: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1.0 - decay)
        for own, new in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(new)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the average; ``model.load_state_dict`` takes it too."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; a model's own state starts the average there."""
        self.module.load_state_dict(state)


def ema_decay(
    step: int, *, half_life: float | None = None, decay: float | None = None, ramp: float = 0.05
) -> float:
    """The decay to use after training step ``step``, with a warm-up that forgets the random start.

    An average over n steps makes no sense before step n. As in EDM's training, the half-life is at most
    ``ramp`` times the steps done, so that the first weights fade at any time.

    Args:
        step: Training steps done so far, 1 after the first.
        half_life: Steps after which a weight counts half, in the long run. Give this or ``decay``.
        decay: The long-run decay per step, in [0, 1).
        ramp: Largest half-life as a fraction of the steps done.

    Raises:
        UserError: Neither or both of ``half_life`` and ``decay`` are given, or one is out of range.
    """
    if (half_life is None) == (decay is None):
        raise UserError(
            "give the moving average one time scale", expected="either half_life or decay, not both"
        )
    if decay is not None:
        if not 0 <= decay < 1:
            raise UserError(
                "the decay of a moving average is out of range", got=decay, expected="0 <= decay < 1"
            )
        half_life = math.log(0.5) / math.log(decay) if decay > 0 else 0.0
    if half_life is None or not 0 <= half_life < math.inf:
        raise UserError(
            "the half-life of a moving average is out of range", got=half_life, expected="0 or more steps"
        )
    effective = min(half_life, ramp * step)
    return 0.5 ** (1.0 / effective) if effective > 0 else 0.0
