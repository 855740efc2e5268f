"""Derivatives of a denoiser along a path through samples and noise levels.

A consistency function has the same value all along a path of the probability flow. The continuous methods
train it on how far its derivative along that path, dy/dsigma = (y - D_teacher) / sigma, is from zero.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import expand

HowToDerive = Literal["exact", "difference"]


@torch.no_grad()
def derivative_along(
    denoiser: nn.Module,
    x: Tensor,
    sigma: Tensor,
    dx: Tensor,
    dsigma: Tensor,
    labels: Tensor | None = None,
    to: Tensor | None = None,
    *,
    how: HowToDerive = "exact",
) -> tuple[Tensor, Tensor]:
    """D(x, sigma) and its derivative ``d/dh D(x + h dx, sigma + h dsigma)`` at h = 0.

    Both are computed in float32 or better, whatever the precision of training: the derivative is a small
    difference of large numbers at high noise levels.

    Args:
        denoiser: The network.
        x: Noised samples (B, *shape).
        sigma: Their levels (B,), positive.
        dx: Direction in the samples (B, *shape).
        dsigma: Direction in the levels (B,), positive.
        labels: Classes (B,), or None.
        to: Levels to jump to (B,), which stay as they are; for networks of two levels.
        how: ``exact`` is forward-mode differentiation, one pass of about twice the cost. ``difference`` is a
            central difference in float64, two passes and a copy of the weights, for networks with a part
            that forward mode does not know.

    Returns:
        Value and derivative, (B, *shape) each, without history.

    Raises:
        UserError: Forward mode is not implemented for a part of the network.
    """
    further = {} if to is None else {"to": to}
    with torch.autocast(x.device.type, enabled=False):
        if how == "difference":
            return _difference(denoiser, x, sigma, dx, dsigma, labels, further)
        try:
            # The fused attention kernels know no forward mode; the plain one does.
            with sdpa_kernel(SDPBackend.MATH):
                found = jvp(lambda y, s: denoiser(y, s, labels, **further), (x, sigma), (dx, dsigma))
                return found[0], found[1]
        except NotImplementedError as error:
            raise UserError(
                "forward-mode derivatives are missing for a part of this network",
                got=str(error).split(".")[0][:160],
                fix="use --tangent difference",
            ) from error


def _difference(
    denoiser: nn.Module,
    x: Tensor,
    sigma: Tensor,
    dx: Tensor,
    dsigma: Tensor,
    labels: Tensor | None,
    further: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The central difference. Its step is a fixed share of the level: networks see levels as ln(sigma)."""
    # No float64 on Apple's GPUs. The shares balance an error ~ h^2 against rounding ~ precision / h.
    wide, share = (torch.float32, 3e-3) if x.device.type == "mps" else (torch.float64, 1e-5)
    state: dict[str, Any] = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    state = {name: t.to(wide) if t.is_floating_point() else t for name, t in state.items()}
    step = share * (sigma / dsigma).to(wide)

    def at(sign: int) -> Tensor:
        y = x.to(wide) + sign * expand(step, x) * dx.to(wide)
        s = sigma.to(wide) + sign * step * dsigma.to(wide)
        return functional_call(denoiser, state, (y, s, labels), {k: t.to(wide) for k, t in further.items()})

    ahead, behind = at(1), at(-1)
    slope = (ahead - behind) / (2 * expand(step, x))
    return ((ahead + behind) / 2).to(x.dtype), slope.to(x.dtype)


def trig_speed(sigma: Tensor, sigma_data: float) -> Tensor:
    """``cos t dsigma/dt = sqrt(sigma^2 + sigma_data^2)`` of TrigFlow's angle, sigma = sigma_data tan t."""
    return (sigma**2 + sigma_data**2).sqrt()


def flow_speed(sigma: Tensor, sigma_data: float) -> Tensor:
    """``t dsigma/dt`` of the straight path's time t = sigma / (sigma + sigma_data)."""
    return sigma * (sigma + sigma_data) / sigma_data


def trig_tangent(
    student: Tensor,
    target: Tensor,
    derivative: Tensor,
    sigma: Tensor,
    sigma_data: float,
    rho: float = 1.0,
) -> Tensor:
    """The tangent g / sigma_data of sCM, in units of the network's output F (arXiv 2410.11081).

    With sigma = sigma_data tan t and x_t = cos t y, an EDM denoiser is a TrigFlow consistency function:
    D = cos t x_t - sin t sigma_data F. The paper's

        g = -cos^2 t (sigma_data F - dx/dt) - rho cos t sin t (x_t + sigma_data dF/dt)

    is then ``a + rho (cos t dD/dt - a)`` with ``a = cos^2 t (D - target) / sin t``: where the warm-up begins,
    the student is pulled to the flow's own denoiser, and in the end along its derivative.

    Args:
        student: D(y, sigma) of the student, (B, ...).
        target: The denoiser whose flow is followed: the teacher's D(y, sigma), or the clean samples of y.
        derivative: cos t dD/dt along that flow: :func:`derivative_along` with :func:`trig_speed`.
        sigma: Levels (B,).
        sigma_data: Standard deviation of the data.
        rho: Share of the derivative, 0 to 1.

    Returns:
        (B, ...).
    """
    norm = trig_speed(sigma, sigma_data)
    cosine, sine = sigma_data / norm, sigma / norm
    pull = expand(cosine**2 / sine, student) * (student - target)
    return (pull + rho * (derivative - pull)) / sigma_data


def bounded(tangent: Tensor, c: float) -> Tensor:
    """``g / (|g| + c)`` with the norm over a sample: shorter than 1, and small where g is small (sCM)."""
    norm = tangent.flatten(1).norm(dim=1)
    return tangent / expand(norm + c, tangent)
