"""The classical f-divergences, each in its true scale and with the centered generator (see ``core``).

p is the teacher, q the student, m = (p + q) / 2, r = p/q. The comment above each row is its textbook
definition. Weights: f-distill, arXiv 2502.15681, table 1, whose JS is twice ours and whose squared Hellinger
is half of ours. Conjugates follow from the textbook ones by f*(t + f'(1)) - f'(1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from distmatch.divergences.core import Divergence
from distmatch.divergences.numerics import (
    LOG2,
    blend,
    bounded,
    bounded_exp,
    constant,
    entropy_excess,
    exp_excess,
    expm1,
    log_max,
    log_mean,
    numeric_conjugate,
    power,
)

# KL(q || p): f = -log r, h = 1.
REVERSE_KL: Divergence = Divergence(
    name="reverse_kl",
    f=exp_excess,
    df=lambda x: -expm1(-x),
    d2f=lambda x: power(x, -2),
    weight=lambda x: constant(x, 1.0),
    conjugate=lambda t: -torch.log1p(-t),
    conjugate_domain=(-math.inf, 1.0),
    swapped=lambda: KL,
    at_zero=math.inf,
)

# KL(p || q): f = r log r, h = r.
KL: Divergence = Divergence(
    name="kl",
    f=entropy_excess,
    df=lambda x: x.clone(),
    d2f=lambda x: power(x, -1),
    weight=lambda x: power(x, 1),
    conjugate=expm1,
    swapped=lambda: REVERSE_KL,
    at_zero=1.0,
)


def _js(x: Tensor) -> Tensor:
    x = bounded(x)
    # E_m over both halves of KL(. || m), each half with the centered KL generator: no cancellation anywhere.
    to_q, to_p = log_mean(x), log_mean(-x)  # log m/q, log m/p
    return bounded_exp(to_q, 0.5) * (entropy_excess(-to_p) + entropy_excess(-to_q))


# KL(p || m) / 2 + KL(q || m) / 2: f = (r log r - (r + 1) log((r + 1) / 2)) / 2, h = r / (2 (1 + r)).
JS: Divergence = Divergence(
    name="js",
    f=_js,
    df=lambda x: -0.5 * log_mean(-x),
    d2f=lambda x: bounded_exp(logsigmoid(-x) - x, 0.5),
    weight=lambda x: 0.5 * torch.exp(logsigmoid(x)),
    conjugate=lambda t: -0.5 * torch.log1p(-torch.expm1(2 * t)),
    conjugate_domain=(-math.inf, 0.5 * LOG2),
    swapped=lambda: JS,
    at_zero=0.5 * LOG2,
)


def _jeffreys(x: Tensor) -> Tensor:
    top = log_max(x.dtype)
    y = x.clamp(max=top - math.log(top))  # so that the product is finite
    return y * expm1(y)


def _jeffreys_slope(x: Tensor) -> Tensor:
    return x - expm1(-x)


def _jeffreys_curvature(x: Tensor) -> Tensor:
    return bounded_exp(-logsigmoid(x) - x)  # (1 + 1/r) / r


# KL(p || q) + KL(q || p): f = (r - 1) log r, h = 1 + r.
JEFFREYS: Divergence = Divergence(
    name="jeffreys",
    f=_jeffreys,
    df=_jeffreys_slope,
    d2f=_jeffreys_curvature,
    weight=lambda x: 1.0 + power(x, 1),
    conjugate=numeric_conjugate(_jeffreys, _jeffreys_slope, _jeffreys_curvature),
    swapped=lambda: JEFFREYS,
    at_zero=math.inf,
)

# int (sqrt p - sqrt q)^2: f = (sqrt r - 1)^2, h = sqrt(r) / 2.
HELLINGER: Divergence = Divergence(
    name="hellinger",
    f=lambda x: expm1(0.5 * x.clamp(max=log_max(x.dtype) - 1.0)) ** 2,
    df=lambda x: -expm1(-0.5 * x),
    d2f=lambda x: power(x, -1.5, 0.5),
    weight=lambda x: power(x, 0.5, 0.5),
    conjugate=lambda t: t / (1.0 - t),
    conjugate_domain=(-math.inf, 1.0),
    swapped=lambda: HELLINGER,
    at_zero=1.0,
)


def _softened_reverse_kl(x: Tensor) -> Tensor:
    x = bounded(x)
    return bounded_exp(log_mean(x), 2.0) * exp_excess(-log_mean(-x))


def _softened_reverse_kl_slope(x: Tensor) -> Tensor:
    # With y = log(1 + 1/r) the second form is 1 - log 2 - (e^y - 1 - y): exact where f' is nearly constant.
    return blend(
        x,
        lambda z: log_mean(-z) - torch.expm1(-z),
        lambda z: 1.0 - LOG2 - exp_excess(-logsigmoid(z)),
    )


def _softened_reverse_kl_curvature(x: Tensor) -> Tensor:
    return bounded_exp(logsigmoid(-x) - 2 * x)


# 2 KL(m || p): f = (r + 1) log((r + 1) / (2 r)), h = 1 / (1 + r).
SOFTENED_REVERSE_KL: Divergence = Divergence(
    name="softened_reverse_kl",
    f=_softened_reverse_kl,
    df=_softened_reverse_kl_slope,
    d2f=_softened_reverse_kl_curvature,
    weight=lambda x: torch.exp(logsigmoid(-x)),
    conjugate=numeric_conjugate(
        _softened_reverse_kl, _softened_reverse_kl_slope, _softened_reverse_kl_curvature
    ),
    conjugate_domain=(-math.inf, 1.0 - LOG2),
    conjugate_limit=LOG2,
    swapped=lambda: SOFTENED_KL,
    at_zero=math.inf,
)


def _softened_kl_conjugate(t: Tensor) -> Tensor:
    x = t.clamp(min=-LOG2)  # f'(0) = -log 2; below it the supremum sits at r = 0
    return expm1(x, 2.0) - x


# 2 KL(m || q): f = (r + 1) log((r + 1) / 2), h = r^2 / (1 + r).
SOFTENED_KL: Divergence = Divergence(
    name="softened_kl",
    f=lambda x: 2.0 * entropy_excess(log_mean(x)),
    df=log_mean,
    d2f=lambda x: torch.exp(logsigmoid(-x)),
    weight=lambda x: bounded_exp(x + logsigmoid(x)),
    conjugate=_softened_kl_conjugate,
    swapped=lambda: SOFTENED_REVERSE_KL,
    at_zero=1.0 - LOG2,
)


def _pearson_conjugate(t: Tensor) -> Tensor:
    x = t.clamp(min=-2.0)  # f'(0) = -2
    return 0.25 * x * x + x


# int (p - q)^2 / q: f = (r - 1)^2, h = 2 r^2.
PEARSON: Divergence = Divergence(
    name="pearson",
    f=lambda x: expm1(x.clamp(max=0.5 * log_max(x.dtype) - 0.5)) ** 2,
    df=lambda x: expm1(x, 2.0),
    d2f=lambda x: constant(x, 2.0),
    weight=lambda x: power(x, 2, 2.0),
    conjugate=_pearson_conjugate,
    swapped=lambda: NEYMAN,
    at_zero=1.0,
)

# int (p - q)^2 / p: f = (1 - r)^2 / r, h = 2 / r.
NEYMAN: Divergence = Divergence(
    name="neyman",
    f=lambda x: -expm1(x) * expm1(-x),
    df=lambda x: -expm1(-2 * x),
    d2f=lambda x: power(x, -3, 2.0),
    weight=lambda x: power(x, -1, 2.0),
    conjugate=lambda t: 2.0 - 2.0 * torch.sqrt(1.0 - t),
    conjugate_domain=(-math.inf, 1.0),
    conjugate_limit=2.0,
    swapped=lambda: PEARSON,
    at_zero=math.inf,
)


def _le_cam(x: Tensor) -> Tensor:
    return blend(
        x,
        lambda x: torch.expm1(x) * torch.tanh(0.5 * x),
        lambda x: bounded_exp(x) + 1.0 - 4.0 * torch.exp(logsigmoid(x)),
    )


def _le_cam_conjugate(t: Tensor) -> Tensor:
    x = t.clamp(min=-3.0)  # f'(0) = -3
    return 4.0 - x - 4.0 * torch.sqrt(1.0 - x)


# int (p - q)^2 / (p + q): f = (r - 1)^2 / (r + 1), h = 8 r^2 / (r + 1)^3.
LE_CAM: Divergence = Divergence(
    name="le_cam",
    f=_le_cam,
    df=lambda x: -expm1(-2 * log_mean(x)),
    d2f=lambda x: 8.0 * torch.exp(3 * logsigmoid(-x)),
    weight=lambda x: 8.0 * torch.exp(2 * logsigmoid(x) + logsigmoid(-x)),
    conjugate=_le_cam_conjugate,
    conjugate_domain=(-math.inf, 1.0),
    conjugate_limit=3.0,
    swapped=lambda: LE_CAM,
    at_zero=1.0,
)

# int |p - q| / 2: f = |r - 1| / 2. f'' is a spike at r = 1, so h = 0 almost everywhere: a value, no gradient.
TV: Divergence = Divergence(
    name="tv",
    f=lambda x: 0.5 * expm1(x).abs(),
    df=lambda x: torch.where(x.isnan(), x, 0.5 * torch.sign(x)),
    d2f=lambda x: constant(x, 0.0),
    weight=lambda x: constant(x, 0.0),
    conjugate=lambda t: t.clamp(min=-0.5),
    conjugate_domain=(-math.inf, 0.5),
    conjugate_limit=0.5,
    swapped=lambda: TV,
    at_zero=0.5,
    differentiable=False,
)

TABLE = {
    row.name: row
    for row in (
        REVERSE_KL,
        KL,
        JS,
        JEFFREYS,
        HELLINGER,
        SOFTENED_REVERSE_KL,
        SOFTENED_KL,
        PEARSON,
        NEYMAN,
        LE_CAM,
        TV,
    )
}
