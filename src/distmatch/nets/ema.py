"""Exponential moving average of the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.nets.shared import copy_buffers, local, role_copy, unshared

_PLAIN = 0.999  # the largest decay without compensation


class EMA:
    """A frozen copy of a model whose parameters follow the model's; what does not learn is shared.

    A step of an average of long half-life is often smaller than half a unit in the last place of float32, and
    would be lost. What rounding leaves of each parameter is therefore kept and added later (Kahan summation).
    Up to a decay of 0.999 all that can be lost is 500 such units, 3e-5 of a weight, and one pass over the
    weights is spared the five others.

    Args:
        model: The model to follow; it is copied and not changed.

    Attributes:
        module: The average, in eval mode and without gradients; use it as any model.
        rest: What the parameters of ``module`` that follow lack of the average, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = role_copy(model).eval().requires_grad_(False)
        pairs = zip(self.module.named_parameters(), model.parameters(), strict=True)
        self.rest = {name: torch.zeros_like(p) for (name, p), of in pairs if p is not of}

    def restart_rest(self) -> None:
        """Sets :attr:`rest` to 0, in the layout that the parameters have now."""
        now = dict(self.module.named_parameters())
        self.rest = {name: torch.zeros_like(now[name]) for name in self.rest}

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Sets ``average = decay * average + (1 - decay) * model``; buffers are copied.

        Args:
            model: The model after its step, of the same architecture.
            decay: In [0, 1]; 0 copies the model.
        """
        average, new = unshared(self.module, model)
        rest = [local(tensor) for tensor in self.rest.values()]
        if decay == 0:
            torch._foreach_copy_(average, new)
            torch._foreach_zero_(rest)
        elif decay <= _PLAIN:
            torch._foreach_lerp_(average, new, 1.0 - decay)
        else:
            # With the average a + rest, rest becomes lerp(rest, new - a); what of it a can hold goes there.
            torch._foreach_lerp_(rest, torch._foreach_sub(new, average), 1.0 - decay)
            moved = torch._foreach_add(average, rest)
            torch._foreach_sub_(average, moved)
            torch._foreach_add_(rest, average)
            torch._foreach_copy_(average, moved)
        copy_buffers(model, self.module)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the average; ``model.load_state_dict`` takes it too."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; a model's own state starts the average there."""
        self.module.load_state_dict(state)
        self.load_rest({})

    def rest_dict(self) -> dict[str, Tensor]:
        """:attr:`rest`, so that a resumed run is bit-identical."""
        return dict(self.rest)

    @torch.no_grad()
    def load_rest(self, rest: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`rest_dict` returned; a name that is missing, as in older checkpoints, is 0."""
        for name, own in self.rest.items():
            own.copy_(rest[name]) if name in rest else own.zero_()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers between two networks of one architecture, wrapped or not."""
    for own, other in zip(*unshared(target, source), strict=True):
        own.copy_(other)
    copy_buffers(source, target)


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
        check_number("the decay of a moving average", decay, "[0, 1)")
        half_life = math.log(0.5) / math.log(decay) if decay > 0 else 0.0
    if half_life is None or not 0 <= half_life < math.inf:
        raise UserError(
            "the half-life of a moving average is out of range", got=half_life, expected="0 or more steps"
        )
    effective = min(half_life, ramp * step)
    return 0.5 ** (1.0 / effective) if effective > 0 else 0.0
