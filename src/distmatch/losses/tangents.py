"""Continuous-time consistency: the tangent of sCM and the identity of MeanFlow.

A consistency function has the same value all along a path of the probability flow,
dx/dsigma = (x - D_p) / sigma, where D_p is the teacher's denoiser or, for training from data alone, the clean
sample of x. Both methods need the derivative of the student along that path, which forward mode gives in one
pass, in float32 and without a graph::

    dsigma = losses.trigflow_speed(sigma, sigma_data)            # or flow_speed for MeanFlow
    dx = losses.flow_direction(x, target, sigma, dsigma)
    value, derivative = torch.func.jvp(student, (x, sigma), (dx, dsigma))
"""

from __future__ import annotations

from torch import Tensor

from distmatch.diffusion.denoiser import expand


def trigflow_speed(sigma: Tensor, sigma_data: float) -> Tensor:
    """``cos t dsigma/dt = sqrt(sigma^2 + sigma_data^2)`` of TrigFlow's angle, sigma = sigma_data tan t."""
    return (sigma**2 + sigma_data**2).sqrt()


def flow_speed(sigma: Tensor, sigma_data: float) -> Tensor:
    """``t dsigma/dt`` of the straight path's time t = sigma / (sigma + sigma_data)."""
    return sigma * (sigma + sigma_data) / sigma_data


def flow_direction(x: Tensor, target: Tensor, sigma: Tensor, speed: Tensor) -> Tensor:
    """The change of x_t along the probability flow while its level changes by ``speed``, (B, ...).

    Args:
        x: x_t, (B, ...).
        target: The denoiser of the flow at x_t: the teacher's, or the clean samples, (B, ...).
        sigma: Levels (B,), positive.
        speed: Their change (B,).
    """
    return expand(speed / sigma, x) * (x - target)


def scm_tangent(
    value: Tensor,
    target: Tensor,
    derivative: Tensor,
    sigma: Tensor,
    sigma_data: float,
    rho: float = 1.0,
) -> Tensor:
    """The tangent g / sigma_data of sCM, in units of the network's output F (arXiv 2410.11081).

    With sigma = sigma_data tan t and x_t = cos t x, an EDM denoiser is a TrigFlow consistency function:
    D = cos t x_t - sin t sigma_data F. The paper's

        g = -cos^2 t (sigma_data F - dx/dt) - rho cos t sin t (x_t + sigma_data dF/dt)

    is then ``a + rho (cos t dD/dt - a)`` with ``a = cos^2 t (D - target) / sin t``: where the warm-up begins,
    the student learns the flow's own denoiser, and in the end to be constant along it.

    Args:
        value: D(x, sigma) of the student, (B, ...), detached.
        target: The denoiser of the flow, (B, ...), detached: the teacher's D(x, sigma), or the clean samples.
        derivative: cos t dD/dt along that flow, (B, ...), detached: the derivative of D in the direction
            :func:`flow_direction` at :func:`trigflow_speed`.
        sigma: Levels (B,).
        sigma_data: Standard deviation of the data.
        rho: Share of the derivative, 0 to 1: the tangent warm-up.

    Returns:
        (B, ...).
    """
    norm = trigflow_speed(sigma, sigma_data)
    cosine, sine = sigma_data / norm, sigma / norm
    denoising = expand(cosine**2 / sine, value) * (value - target)
    return (denoising + rho * (derivative - denoising)) / sigma_data


def bounded_tangent(tangent: Tensor, c: float) -> Tensor:
    """``g / (|g| + c)`` with the norm over a sample: shorter than 1, and small where g is small (sCM)."""
    norm = tangent.flatten(1).norm(dim=1)
    return tangent / expand(norm + c, tangent)


def scm_loss(
    prediction: Tensor, tangent: Tensor, sigma: Tensor, sigma_data: float, *, c: float = 0.1
) -> Tensor:
    """``|F - sg F - g / (|g| + c)|^2``, a mean over the elements of a sample (sCM, arXiv 2410.11081, eq. 8).

    F = (cos t x_t - D) / (sigma_data sin t) is the network's output. The value is that of the bounded tangent
    and says little about progress. sCM weighs levels by 1 / tan t and by
    :func:`~distmatch.losses.denoising.uncertainty_loss`.

    Args:
        prediction: D(x, sigma) of the student, (B, ...), with gradient.
        tangent: From :func:`scm_tangent`, (B, ...), detached.
        sigma: Levels (B,).
        sigma_data: Standard deviation of the data.
        c: Bound of the tangent.

    Returns:
        (B,).
    """
    slope = trigflow_speed(sigma, sigma_data) / (sigma_data * sigma)
    change = expand(slope, prediction) * (prediction.detach() - prediction)  # F - sg F
    return (change - bounded_tangent(tangent, c)).flatten(1).square().mean(dim=1)


def mean_flow_error(
    value: Tensor, target: Tensor, derivative: Tensor, sigma: Tensor, to: Tensor, sigma_data: float
) -> Tensor:
    """``u - (v - (t - r) du/dt)`` in units of sigma_data: zero by the MeanFlow identity.

    On the straight path x_t = (1 - t) x0 + t sigma_data eps, with t = sigma / (sigma + sigma_data), the
    average velocity from t down to r is u = (x_t - g) / t, where g = D(x, sigma, to) is a network of two
    levels. With v = (x_t - target) / t the error is ``((r/t) (target - g) - (1 - r/t) t dg/dt) / t``: at r =
    t that of the velocity, and at r = 0 the derivative of a consistency function (arXiv 2505.13447, eq. 6).

    Args:
        value: g, (B, ...), detached.
        target: The denoiser of the flow, (B, ...), detached: the teacher's D(x, sigma), or the clean samples.
        derivative: t dg/dt along that flow, (B, ...), detached: the derivative of g in the direction
            :func:`flow_direction` at :func:`flow_speed`, with ``to`` fixed.
        sigma: Levels of t, (B,).
        to: Levels of r, (B,), at most ``sigma``.
        sigma_data: Standard deviation of the data.

    Returns:
        (B, ...).
    """
    t, r = sigma / (sigma + sigma_data), to / (to + sigma_data)
    stays = expand(r / t, value)
    return (stays * (target - value) - (1 - stays) * derivative) / (expand(t, value) * sigma_data)


def mean_flow_loss(
    prediction: Tensor,
    error: Tensor,
    sigma: Tensor,
    sigma_data: float,
    *,
    power: float = 0.75,
    floor: float = 4e-3,
) -> Tensor:
    """``w |u - sg(v - (t - r) du/dt)|^2`` with the weight ``w = 1 / (|error|^2 + c)^p`` held constant.

    MeanFlow (arXiv 2505.13447).

    Args:
        prediction: g = D(x, sigma, to) of the student, (B, ...), with gradient.
        error: From :func:`mean_flow_error`, (B, ...), detached.
        sigma: Levels of t, (B,).
        sigma_data: Standard deviation of the data.
        power: p; 0 is the plain square.
        floor: c, in units of sigma_data^2: the published 1e-3 is for data of standard deviation 1/2.

    Returns:
        (B,), sums over the elements of a sample.
    """
    slope = (sigma + sigma_data) / (sigma * sigma_data)
    change = expand(slope, prediction) * (prediction.detach() - prediction)  # u - sg u
    square = (error + change).flatten(1).square().sum(dim=1)
    return (square.detach() + floor) ** -power * square
