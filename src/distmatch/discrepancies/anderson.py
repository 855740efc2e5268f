"""Anderson mixing (Anderson 1965): the next point of a fixed-point iteration from the last few."""

from __future__ import annotations

import torch
from torch import Tensor

_HISTORY = 20
_RIDGE = 1e-10


class Anderson:
    """Anderson mixing of a fixed-point iteration, in the norm weighted by ``weight`` (m,).

    The last differences of points and of steps are rows of two rings; the Gram matrix of the step differences
    is brought up to date by one product with a vector a time.
    """

    def __init__(self, weight: Tensor) -> None:
        self.root = weight.sqrt()
        self.d_point = weight.new_zeros(_HISTORY, weight.shape[0])
        self.d_step = torch.zeros_like(self.d_point)
        self.gram = weight.new_zeros(_HISTORY, _HISTORY)
        self.clear()

    def clear(self) -> None:
        """Forgets the past."""
        self.count = 0
        self.last: tuple[Tensor, Tensor] | None = None

    def next(self, point: Tensor, step: Tensor) -> Tensor:
        """The next point, given the plain step from this one."""
        weighted = self.root * step
        if self.last is None:
            self.last = (point, weighted)
            return point + step
        slot = self.count % _HISTORY
        self.count += 1
        used = min(self.count, _HISTORY)
        self.d_point[slot] = point - self.last[0]
        self.d_step[slot] = weighted - self.last[1]
        self.last = (point, weighted)
        overlap = self.d_step[:used] @ self.d_step[slot]
        self.gram[slot, :used] = overlap
        self.gram[:used, slot] = overlap
        gram = self.gram[:used, :used]
        size = gram.diagonal().clamp_min(1e-300).sqrt()
        system = gram / (size[:, None] * size) + _RIDGE * torch.eye(
            used, dtype=gram.dtype, device=gram.device
        )
        gamma = torch.linalg.solve(system, (self.d_step[:used] @ weighted) / size) / size
        return point + step - gamma @ self.d_point[:used] - (gamma @ self.d_step[:used]) / self.root
