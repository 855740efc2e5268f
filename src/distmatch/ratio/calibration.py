"""Calibration of a classifier's log-ratio on samples that it was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.errors import unknown_name
from distmatch.ratio.samples import LogRatio

CALIBRATIONS = ("platt", "temperature", "isotonic", "none")
_NEWTON_STEPS = 50


def calibrate(kind: str, on_p: Tensor, on_q: Tensor) -> tuple[LogRatio, dict[str, float]]:
    """A monotone map of log-ratios that makes them agree with the held-out labels.

    With n and m held-out samples, the chance that a point came from p is sigmoid(log r + log(n/m)).

    * ``platt``: a log r + b, by maximum likelihood with Platt's smoothed labels, which keep a finite even if
        the two samples are separable (Platt 1999).
    * ``temperature``: the same with b = 0.
    * ``isotonic``: the best monotone map, piecewise linear in the probability; it cannot go beyond the
      probabilities 1/(n + m + 2) away from 0 and 1, and its gradient is flat in places.

    Args:
        kind: One of :data:`CALIBRATIONS`.
        on_p: Log-ratios (n,) at held-out samples of p, float64.
        on_q: Log-ratios (m,) at held-out samples of q, float64.

    Returns:
        The map, and its parameters.
    """
    prior = math.log(len(on_p) / len(on_q))
    if kind == "none":
        return (lambda log_r: log_r), {}
    if kind in ("platt", "temperature"):
        slope, offset = _platt(on_p, on_q, prior, free_offset=kind == "platt")
        return (lambda log_r: slope * log_r + offset), {"slope": slope, "offset": offset}
    if kind == "isotonic":
        return _isotonic(on_p, on_q, prior), {}
    raise unknown_name("calibration", kind, CALIBRATIONS)


def _platt(on_p: Tensor, on_q: Tensor, prior: float, free_offset: bool) -> tuple[float, float]:
    """Slope and offset by Newton's method with step halving; the loss is convex."""
    x = torch.cat([on_p, on_q])
    n, m = len(on_p), len(on_q)
    target = torch.cat([torch.full_like(on_p, (n + 1) / (n + 2)), torch.full_like(on_q, 1 / (m + 2))])
    columns = torch.stack([x, torch.ones_like(x)], 1) if free_offset else x[:, None]

    def loss(w: Tensor) -> Tensor:
        logit = columns @ w + prior
        return (torch.nn.functional.softplus(logit) - target * logit).mean()

    w = torch.zeros(columns.shape[1], dtype=x.dtype, device=x.device)
    w[0] = 1.0
    value = loss(w)
    jitter = 1e-12 * columns.square().mean(0).diag()
    for _ in range(_NEWTON_STEPS):
        chance = torch.sigmoid(columns @ w + prior)
        gradient = columns.T @ (chance - target) / len(x)
        hessian = (columns * (chance * (1 - chance))[:, None]).T @ columns / len(x)
        step = torch.linalg.solve(hessian + jitter, gradient)
        shrink = 1.0
        while loss(w - shrink * step) > value and shrink > 1e-6:
            shrink /= 2
        w = w - shrink * step
        value = loss(w)
        if (gradient @ step).abs() < 1e-14:
            break
    return w[0].item(), w[1].item() if free_offset else 0.0


def _isotonic(on_p: Tensor, on_q: Tensor, prior: float) -> LogRatio:
    from sklearn.isotonic import IsotonicRegression  # here, because importing it takes a second

    x = torch.cat([on_p, on_q])
    label = torch.cat([torch.ones_like(on_p), torch.zeros_like(on_q)])
    edge = 1 / (len(x) + 2)
    fit = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip")
    fit.fit(x.cpu().numpy(), label.cpu().numpy())
    knots = torch.as_tensor(fit.X_thresholds_, dtype=x.dtype, device=x.device)
    heights = torch.as_tensor(fit.y_thresholds_, dtype=x.dtype, device=x.device)
    if len(knots) == 1:
        return lambda log_r: torch.logit(heights[0]) - prior + 0.0 * log_r

    def interpolated(log_r: Tensor) -> Tensor:
        inside = log_r.clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, inside.detach()).clamp(1, len(knots) - 1)
        share = (inside - knots[right - 1]) / (knots[right] - knots[right - 1])
        return torch.logit(torch.lerp(heights[right - 1], heights[right], share)) - prior

    return interpolated
