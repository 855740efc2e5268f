"""The exact value of every divergence between two discrete distributions, zeros included."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.checks import check_equal
from distmatch.base.errors import UserError
from distmatch.divergences.core import Divergence
from distmatch.divergences.lookup import measure
from distmatch.divergences.pointwise import total
from distmatch.divergences.renyi import Renyi


def _probabilities(x: Tensor, who: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError(
            f"{who} must be a floating-point tensor of probabilities",
            got=x.dtype if isinstance(x, Tensor) else type(x).__name__,
            expected="float32 or float64, shape (..., K)",
            fix="divide counts by their sum",
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UserError(
            f"{who} has no outcomes", got=f"shape {tuple(x.shape)}", expected="shape (..., K), K >= 1"
        )
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if not bool(x.isfinite().all()) or bool((x < 0).any()):
        raise UserError(
            f"{who} contains a value that is not a probability",
            got="NaN, an infinite or a negative value",
            expected="numbers of at least 0",
        )
    off = (x.sum(-1) - 1.0).abs().max().item() if x.numel() else 0.0
    if off > (1e-3 if x.dtype == torch.float32 else 1e-6):
        raise UserError(
            f"the probabilities of {who} do not sum to 1",
            got=f"a sum that is off by {off:.3g}",
            expected="a sum of 1 over the last dimension",
            fix="divide them by their sum",
        )
    return x


def divergence_discrete(which: str | Divergence | Renyi, p: Tensor, q: Tensor) -> Tensor:
    """D_f(p || q) of two discrete distributions, exact, including outcomes only one of them has.

    Outcomes with q = 0 < p count f'(inf) p, outcomes with p = 0 < q count f(0) q: the value is inf where the
    divergence is. Autograd flows through both.

    Args:
        which: A name accepted by :func:`distmatch.divergences.measure`, or its object.
        p: Probabilities of the teacher, shape (..., K), each row summing to 1.
        q: Probabilities of the student; its shape must match or broadcast, with the same K.

    Returns:
        Values in nats, shape (...), in the wider dtype of the two.

    Raises:
        UserError: Not probabilities, or the shapes do not match.
    """
    p, q = _probabilities(p, "p"), _probabilities(q, "q")
    check_equal("the numbers of outcomes of p and q, their last dimensions,", p.shape[-1], q.shape[-1])
    dtype = torch.promote_types(p.dtype, q.dtype)
    p, q = torch.broadcast_tensors(p.to(dtype), q.to(dtype))

    def log(x: Tensor) -> Tensor:
        # log 0 = -inf, but without the infinite slope that would turn the gradient of 0 log 0 into NaN.
        return torch.where(x > 0, torch.where(x > 0, x, torch.ones_like(x)).log(), -torch.inf)

    return total(measure(which), log(p), log(q))
