"""Whether a model's densities at different noise levels belong to one diffusion: the Fokker-Planck residual.

For dx = f(t) x dt + g(t) dw, the true phi = log p_t has

    R = d_t phi + d f + f x . grad phi - g^2/2 (lap phi + |grad phi|^2) = 0

(as in Lai et al. 2023 and arXiv 2311.15996). In the frame y = x0 + sigma eps with time sigma, f = 0 and
g^2 = 2 sigma. A score alone fixes phi up to c(t), so its residual is the gradient of R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distmatch.base.checks import check_count
from distmatch.base.estimate import Estimate
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.geometry.any_order import AnyOrder
from distmatch.diffusion.geometry.jacobian import (
    basis_of,
    connected,
    refuse_random_layers,
    slopes,
    trace_probes,
)
from distmatch.diffusion.geometry.summary import ratio_of

Drift = Callable[[Tensor], tuple[Tensor, Tensor]]


def exploding(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """No drift and g^2 = 2 sigma: the frame y = x0 + sigma eps, with sigma as time."""
    return torch.zeros_like(sigma), 2 * sigma


def potential_residual(
    potential: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    *,
    process: Drift = exploding,
    trace: str = "exact",
    seed: int = 0,
    create_graph: bool = False,
) -> Tensor:
    """R at each point, in nats for each unit of time.

    A c(t) that is added to the potential adds c'(t) to R: it sees the normalizer too.

    Args:
        potential: phi(x, t) in nats, (B, *shape) and (B,) to (B,), twice differentiable.
        x: Positions (B, *shape).
        t: Times (B,).
        process: t (B,) to f and g^2, each (B,); by default t is sigma and data have the noise sigma eps.
        trace: How to take the Laplacian: ``"exact"``, ``"rademacher:m"`` or ``"gaussian:m"``.
        seed: Seed of the probes.
        create_graph: Whether the result can be differentiated, to train with it.

    Returns:
        (B,).
    """
    probes = trace_probes(trace, x, seed=seed)
    rows, count = (basis_of(x), 1) if probes is None else (probes, len(probes))
    # Fused attention has no second derivative, fused layer normalization a wrong third one.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), AnyOrder():
        place = x if x.requires_grad else x.detach().requires_grad_()
        time = t if t.requires_grad else t.detach().requires_grad_()
        value = potential(place, time)
        value = connected(value, place, lambda moved: potential(moved, time), "this potential")
        value = connected(value, time, lambda moved: potential(place, moved), "this potential")
        slope, rate = slopes(value, (place, time), create_graph=True)
        flat = slope.flatten(1)
        curvature = torch.zeros_like(value)
        for e in rows:
            (pulled,) = slopes(slope * e, (place,), create_graph=True)
            curvature = curvature + (pulled * e).flatten(1).sum(1) / count
        f, g2 = process(time)
        drift = f * (flat.shape[1] + (place * slope).flatten(1).sum(1))
        residual = rate + drift - 0.5 * g2 * (curvature + flat.square().sum(1))
    return residual if create_graph else residual.detach()


@dataclass(frozen=True)
class ScoreResidual:
    """d_sigma s - grad[sigma (div s + |s|^2)].

    Attributes:
        residual: (K, B, D): one unbiased value for each probe; one value (K = 1) when exact.
        rate: d_sigma s, (B, D), to compare with.
        exact: Whether ``residual`` has no probe noise.
    """

    residual: Tensor
    rate: Tensor
    exact: bool

    def relative(self) -> Estimate:
        """sqrt(E|residual|^2 / E|rate|^2): 0 for a true score, of order 1 for an unrelated family.

        Probe noise is removed by multiplying different probes; without it a small value can come out as 0.
        """
        if self.exact:
            squares = self.residual[0].square().sum(-1)
        else:
            k = len(self.residual)
            together = self.residual.sum(0).square() - self.residual.square().sum(0)
            squares = together.sum(-1) / (k * (k - 1))
        size = self.rate.square().sum(-1)
        square = ratio_of(squares, size)
        value = math.sqrt(max(square.value, 0.0))
        stderr = square.stderr / (2 * value) if value > 0 else math.sqrt(square.stderr)
        return Estimate(value, stderr, square.n)


def score_residual(
    denoiser: Denoiser,
    y: Tensor,
    sigma: Tensor,
    *,
    conditioning: ConditioningLike = None,
    trace: str = "exact",
    seed: int = 0,
) -> ScoreResidual:
    """The residual of the score (D - y) / sigma^2 of a denoiser.

    Args:
        denoiser: The model, twice differentiable in ``y`` and once in ``sigma``.
        y: Positions (B, *shape).
        sigma: Levels (B,).
        conditioning: Labels (B,), -1 for none.
        trace: ``"exact"`` (D backward passes) or ``"rademacher:m"`` or ``"gaussian:m"`` with m of 2 or more.
        seed: Seed of the probes.

    Raises:
        UserError: One probe, or a model without a score.
    """
    probes = trace_probes(trace, y, seed=seed)
    if probes is not None:
        check_count("the number of probes", len(probes), 2, fix="one has its noise in the residual")
    residual, rate = _residuals(denoiser, y, sigma, conditioning, probes)
    return ScoreResidual(residual.double().flatten(2), rate.double().flatten(1), probes is None)


def fokker_planck_loss(
    denoiser: Denoiser,
    y: Tensor,
    sigma: Tensor,
    probes: Tensor,
    conditioning: ConditioningLike = None,
) -> Tensor:
    """The mean square of sigma^2 times the residual of a score, to train with: 0 for a true score.

    A relative error e of the predicted noise gives a residual of about e / sigma^2, so that the factor makes
    noise levels comparable and the loss free of units. Different probes are multiplied: the
    loss is the exact one on average, and can be negative.

    Args:
        denoiser: The model, three times differentiable.
        y: Positions (B, *shape).
        sigma: Levels (B,).
        probes: Random signs or normals (K, B, *shape), K of 2 or more.
        conditioning: Of the samples.

    Returns:
        (B,), with a graph to the parameters.

    Raises:
        UserError: One probe, or a model without a score.
    """
    check_count("the number of probes", len(probes), 2, fix="one has its noise in the residual")
    residual, _ = _residuals(denoiser, y, sigma, conditioning, probes, create_graph=True)
    scaled = sigma.reshape(1, -1, 1) ** 2 * residual.flatten(2)
    k = len(probes)
    return ((scaled.sum(0).square() - scaled.square().sum(0)) / (k * (k - 1))).mean(-1)


def _residuals(
    denoiser: Denoiser,
    y: Tensor,
    sigma: Tensor,
    conditioning: ConditioningLike,
    probes: Tensor | None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residuals (K, B, *shape), one for each probe or the exact one, and d_sigma s."""
    require_score(denoiser, "the Fokker-Planck residual")
    refuse_random_layers(denoiser)
    # Fused attention has no second derivative, fused layer normalization a wrong third one.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), AnyOrder():
        place, level = y.detach().requires_grad_(), sigma.detach().requires_grad_()
        wide = level.reshape(-1, *([1] * (y.ndim - 1)))
        clean = denoiser(place, level, conditioning)
        clean = connected(clean, place, lambda moved: denoiser(moved, level, conditioning))
        clean = connected(clean, level, lambda moved: denoiser(place, moved, conditioning))
        score = (clean - place) / wide**2
        dummy = torch.zeros_like(score, requires_grad=True)
        (along,) = torch.autograd.grad((score * dummy).sum(), level, create_graph=True)
        (rate,) = torch.autograd.grad(along.sum(), dummy, retain_graph=True, create_graph=create_graph)
        (pull,) = slopes(wide * score**2, (place,), create_graph=create_graph)
        bends = []
        for e in basis_of(y) if probes is None else probes:
            (pulled,) = slopes(score * e, (place,), create_graph=True)
            (bend,) = slopes(wide * pulled * e, (place,), create_graph=create_graph)
            bends.append(bend)
        bend = torch.stack(bends) if probes is not None else torch.stack(bends).sum(0, keepdim=True)
        residual = rate - pull - bend
    return (residual, rate) if create_graph else (residual.detach(), rate.detach())
