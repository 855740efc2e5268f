"""Losses of the Fisher family: SiD, SIM with several distances, Uni-Instruct.

What to detach: teacher and fake score are frozen *functions*. Their parameters do not learn here, but both
must be differentiated with respect to their input x_t = x0 + sigma eps, so compute them with gradients
enabled, from an ``x0`` that requires a gradient (the generator's samples, or a leaf in their place). What is
called a weight below is detached inside. With D for denoisers and Delta = D_p - D_q the score difference is
delta = s_p - s_q = Delta / sigma^2, and s_q(x_t) - s(x_t | x0) = (D_q - x0) / sigma^2.

What makes these losses tractable: (D_q - x0) has mean zero given x_t, for whatever generator. Differentiating
E[u(x_t) (D_q - x0)] = 0 trades the unknown dependence of D_q on the generator's parameters for a gradient
through the samples (score projection; SiD, arXiv 2404.04057).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distmatch.divergences import Divergence
from distmatch.losses.matching import Scaling, difference_weight

Distance = Literal["huber", "squared", "absolute"]


def sid_loss(
    teacher: Tensor,
    fake: Tensor,
    x0: Tensor,
    sigma: Tensor,
    *,
    alpha: float = 1.2,
    scaling: Scaling = "dmd2",
) -> Tensor:
    """SiD's loss of the generator, w [(1 - alpha) |Delta|^2 + Delta . (D_q - x0)], summed over a sample.

    With a perfect fake score and ``scaling="score"`` its gradient is half that of the Fisher divergence
    E_q|s_p - s_q|^2 at alpha = 1/2, and the second term alone at alpha = 1. Its mean is (1 - alpha)
    E|Delta|^2: negative for alpha > 1, so it does not measure progress.

    Args:
        teacher: D_p(x_t), (B, ...), a function of ``x0``.
        fake: D_q(x_t), likewise.
        x0: The generator's clean samples, (B, ...).
        sigma: Noise levels (B,).
        alpha: SiD's alpha.
        scaling: As for :func:`~distmatch.losses.matching.difference_weight`.

    Returns:
        (B,), the loss of each sample: a sum over its elements.
    """
    difference, residual = _differences(teacher, fake, x0)
    square, crossed = _dot(difference, difference), _dot(difference, residual)
    return difference_weight(teacher, x0, sigma, scaling) * ((1.0 - alpha) * square + crossed)


def distance_slope(y: Tensor, distance: Distance, c: float) -> Tensor:
    """The derivative d'(y) of a distance between scores, summed over a sample of n elements.

    ``huber``: n sqrt(mean(y^2) + c^2), the pseudo-Huber distance of SIM up to a factor. Its c is a share of a
    typical element, whatever n is; in terms of the norm of y it is c sqrt(n).
    ``squared``: |y|^2, which is SiD with alpha = 1.
    ``absolute``: the sum of sqrt(y_i^2 + c^2), each element by itself. c rounds the kink off: the derivative
    of a sign is zero wherever autograd looks, and its jumps at y_i = 0 would go missing in the gradient.

    Args:
        y: (B, n).
        distance: Its name.
        c: Where it turns from quadratic to linear; not read by ``squared``.
    """
    if distance == "squared":
        return 2.0 * y
    squares = y.square()
    return y * ((squares.mean(1, keepdim=True) if distance == "huber" else squares) + c * c).rsqrt()


def sim_loss(
    teacher: Tensor,
    fake: Tensor,
    x0: Tensor,
    sigma: Tensor,
    *,
    distance: Distance = "huber",
    c: float = 0.3,
    scaling: Scaling = "dmd2",
) -> Tensor:
    """SIM's loss of the generator, d'(w Delta) . w (D_q - x0) (arXiv 2410.16794, theorem 1).

    Its gradient is that of E_pi[d(s_p - s_q)] under samples pi of the generator that are held fixed.

    Args:
        teacher: D_p(x_t), (B, ...), a function of ``x0``.
        fake: D_q(x_t), likewise.
        x0: The generator's clean samples, (B, ...).
        sigma: Noise levels (B,).
        distance: As for :func:`distance_slope`.
        c: Likewise, in units of w Delta.
        scaling: ``score``: both factors w are sigma^-2. ``dmd2``: the inner one is 1 / mean|x0 - D_p|, so
            that c is relative to the typical denoising error at that noise level, and the outer one is
            omitted.

    Returns:
        (B,), the loss of each sample: a sum over its elements.
    """
    difference, residual = _differences(teacher, fake, x0)
    weight = difference_weight(teacher, x0, sigma, scaling)
    inner = (weight.sqrt() if scaling == "score" else weight)[:, None]
    loss = _dot(distance_slope(inner * difference, distance, c), residual)
    return loss * weight.sqrt() if scaling == "score" else loss


def weight_derivatives(divergence: Divergence, log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h(r), r h'(r) and r^2 h''(r), elementwise, by differentiation in log r.

    r h' = dh/dlog r and r^2 h'' = d2h/dlog r^2 - dh/dlog r, so a custom divergence needs no further
    functions.
    """

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: divergence.weight(y).sum())(x)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        first = slope(x)
        return first.sum(), first

    second, first = torch.func.grad(both, has_aux=True)(log_r)
    return divergence.weight(log_r), first, second - first


def uni_instruct_loss(
    teacher: Tensor,
    fake: Tensor,
    x0: Tensor,
    x: Tensor,
    sigma: Tensor,
    log_r: Tensor,
    divergence: Divergence,
    *,
    scaling: Scaling = "dmd2",
) -> Tensor:
    """Three terms whose gradient is exactly that of E_q[h(r) |s_p - s_q|^2] (Uni-Instruct, arXiv 2505.20755).

    D_f(p||q) = 1/2 int E_q[h(r) |s_p - s_q|^2] dsigma^2 over all levels, so lowering it at every level lowers
    D_f of the clean samples. Per sample, with weights that are constants in the other two:

        2 h(r) delta . (s_q - s(x_t|x0))  +  [h - r h'] |delta|^2  +  [-r^2 h'' |delta|^2 delta] . x_t

    Reverse KL is SiD with alpha = 1/2 (twice); forward KL is the first term alone.

    Args:
        teacher: D_p(x_t), (B, ...), a function of ``x0``.
        fake: D_q(x_t), likewise.
        x0: The generator's clean samples, (B, ...).
        x: x_t, (B, ...), likewise.
        sigma: Noise levels (B,).
        log_r: log p/q at x_t, (B,), a function of ``x0``: the first term is differentiated through h(r) too.
            A detached one gives a biased gradient of the spread.
        divergence: Whose h it is.
        scaling: As for :func:`~distmatch.losses.matching.difference_weight`.

    Returns:
        (B,), the loss of each sample: a sum over its elements.
    """
    difference, residual = _differences(teacher, fake, x0)
    _, first, second = weight_derivatives(divergence, log_r.detach())
    h = divergence.weight(log_r)
    square = _dot(difference, difference)
    level = sigma.to(square.dtype)
    drift = (second * square).detach()[:, None] * difference.detach() / level[:, None] ** 2
    loss = 2.0 * h * _dot(difference, residual)
    loss = loss + (h - first).detach() * square
    loss = loss - _dot(drift, x.to(drift.dtype).flatten(1))
    return difference_weight(teacher, x0, sigma, scaling) * loss


def log_ratio_slope(teacher: Tensor, fake: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Zero, with the gradient of log p/q in ``x``: the score difference s_p - s_q.

    Added to a detached log ratio it is the input of :func:`uni_instruct_loss`, without differentiating a
    discriminator.

    Args:
        teacher: D_p(x_t), (B, ...); it is detached here.
        fake: D_q(x_t), likewise.
        x: x_t, (B, ...), a function of ``x0``.
        sigma: Noise levels (B,).

    Returns:
        (B,).
    """
    scores = (teacher - fake).detach().flatten(1) / sigma[:, None] ** 2
    return (scores * (x - x.detach()).flatten(1)).sum(1)


def _differences(teacher: Tensor, fake: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """D_p - D_q and D_q - x0, (B, n)."""
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    p, q, x = (v.to(dtype).flatten(1) for v in (teacher, fake, x0))
    return p - q, q - x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, (B,)."""
    return (a * b).sum(1)
