"""Derivatives of a denoiser along a path through samples and noise levels.

A consistency function has the same value all along a path of the probability flow. The continuous methods
train it on how far its derivative along that path, dy/dsigma = (y - D_teacher) / sigma, is from zero.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning, example_conditioning
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.interop import is_external

HowToDerive = Literal["exact", "difference"]


@torch.no_grad()
def derivative_along(
    denoiser: nn.Module,
    x: Tensor,
    sigma: Tensor,
    dx: Tensor,
    dsigma: Tensor,
    conditioning: Conditioning = UNCONDITIONAL,
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
        conditioning: What the samples are conditioned on.
        to: Levels to jump to (B,), which stay as they are; for networks of two levels.
        how: ``exact`` is forward-mode differentiation, one pass of about twice the cost. ``difference`` is a
            central difference in float64, five passes and a copy of the weights, for networks with a part
            that does not support forward mode.

    Returns:
        Value and derivative, (B, *shape) each, without history.

    Raises:
        UserError: Forward mode is not implemented for a part of the network.
    """
    further = {} if to is None else {"target_sigma": to}
    with torch.autocast(x.device.type, enabled=False):
        if how == "difference":
            return _difference(denoiser, x, sigma, dx, dsigma, conditioning, further)
        try:
            # The fused attention kernels do not support forward mode; the math kernel does.
            with sdpa_kernel(SDPBackend.MATH):
                found = jvp(lambda y, s: denoiser(y, s, conditioning, **further), (x, sigma), (dx, dsigma))
                return found[0], found[1]
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                "this network does not support forward-mode derivatives",
                got=str(error).splitlines()[0][:160],
                fix="use --tangent difference",
            ) from error


def allow_forward_mode(denoiser: nn.Module) -> list[RemovableHandle]:
    """Disables parts of networks from elsewhere that do not support forward mode.

    Torch derives a group norm only where its input is contiguous, which after attention it need not be. The
    values stay the same up to rounding.

    Returns:
        What undoes it.
    """
    norms = [part for part in denoiser.modules() if isinstance(part, nn.GroupNorm)]
    return [norm.register_forward_pre_hook(_contiguous) for norm in norms]


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)


def choose_derivative(
    wanted: Literal["auto", "exact", "difference"], denoiser: Denoiser | None
) -> HowToDerive:
    """How to differentiate copies of a denoiser: a network from elsewhere is tried on two samples.

    Built-in networks support forward-mode derivatives; None means a new one of them.

    Raises:
        UserError: ``exact`` was requested and is not supported.
    """
    if wanted == "difference":
        return "difference"
    if not (isinstance(denoiser, nn.Module) and is_external(denoiser)):
        return "exact"
    device = next(denoiser.parameters()).device
    x, sigma = torch.ones(2, *denoiser.shape, device=device), torch.ones(2, device=device)
    conditioning = example_conditioning(denoiser, 2, device)
    handles = allow_forward_mode(denoiser)
    try:
        derivative_along(denoiser, x, sigma, x, sigma, conditioning)
    except UserError as error:
        if wanted == "exact":
            raise
        warnings.warn(f"differences in float64 are used instead: {error}", stacklevel=2)
        return "difference"
    finally:
        for handle in handles:
            handle.remove()
    return "exact"


def _difference(
    denoiser: nn.Module,
    x: Tensor,
    sigma: Tensor,
    dx: Tensor,
    dsigma: Tensor,
    conditioning: Conditioning,
    further: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The central difference of fourth order. Its step is a share of the level, as networks see ln(sigma).

    Networks from elsewhere often count times to 1000, see them as sines of up to 1 rad a time, and round them
    to float32. The step is short enough for the first and long enough for the second.
    """
    # No float64 on Apple's GPUs.
    wide, share = (torch.float32, 1e-2) if x.device.type == "mps" else (torch.float64, 2e-4)
    state: dict[str, Any] = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    state = {name: t.to(wide) if t.is_floating_point() else t for name, t in state.items()}
    step = share * (sigma / dsigma).to(wide)

    def at(steps: int) -> Tensor:
        y = x.to(wide) + steps * expand(step, x) * dx.to(wide)
        s = sigma.to(wide) + steps * step * dsigma.to(wide)
        return functional_call(
            denoiser, state, (y, s, conditioning), {k: t.to(wide) for k, t in further.items()}
        )

    slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * expand(step, x))
    return at(0).to(x.dtype), slope.to(x.dtype)
