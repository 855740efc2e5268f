"""The one step that all optimizers take: clipped by the norm of all parameters together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distmatch.nets.optim import clipped_step


@pytest.mark.parametrize(
    ("bound", "factor"), [(0.0, 1.0), (20.0, 1.0), (13.0, 1.0), (6.5, 0.5), (1.3, 0.1)], ids=str
)
def test_the_gradient_is_scaled_to_the_bound_and_no_more(bound: float, factor: float) -> None:
    # Two groups with gradients (3, 4) and 12: the norm of both together is 13.
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD([{"params": [weights[0], weights[2]]}, {"params": [weights[1]]}], lr=1.0)
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    norm = clipped_step(optimizer, bound)
    assert float(norm) == pytest.approx(13.0)
    moved = torch.cat([w.detach() for w in weights])
    torch.testing.assert_close(moved, -factor * torch.tensor([3.0, 4.0, 12.0, 0.0, 0.0, 0.0]))
    assert all(w.grad is None for w in weights)
