"""Is a denoiser's score a gradient, and does it matter: conservativity and gauge freedom.

A field s = grad log p + r moves samples and densities exactly as grad log p does if
div r + r . grad log p = 0 (Horvat and Pfister 2024, arXiv 2402.03845). So a field that is no gradient need
not be wrong; but local geometry (dimension, Jacobian spectra) is only read correctly from a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand, require_score
from distmatch.diffusion.geometry.jacobian import (
    denoise_for_gradient,
    denoise_with_trace,
    draw_probes,
    pull_back,
    refuse_random_layers,
    trace_probes,
)
from distmatch.diffusion.geometry.summary import ratio_of


def curl_share(
    denoiser: Denoiser,
    y: Tensor,
    sigma: Tensor,
    *,
    conditioning: ConditioningLike = None,
    probes: int = 16,
    seed: int = 0,
) -> Estimate:
    """|J - J^T|^2 / (4 |J|^2), J = dD/dy: 0 for a gradient field, 1 for a pure rotation.

    With random signs u, v it is E (u^T J v - v^T J u)^2 / (4 E (u^T J v)^2); one probe costs two VJPs.

    Args:
        denoiser: The model.
        y: Positions (B, *shape).
        sigma: Levels (B,).
        conditioning: Labels (B,), -1 for none.
        probes: Pairs of directions for each position.
        seed: Seed of the probes.

    Returns:
        The share over all positions, with a standard error from their spread; n positions.
    """
    refuse_random_layers(denoiser)
    shape = tuple(y.shape[1:])
    pairs = draw_probes("rademacher", 2 * probes, len(y), shape, seed=seed, like=y)
    u, v = pairs.chunk(2)
    out, leaf = denoise_for_gradient(denoiser, y, sigma, conditioning)
    forth, back = [], []
    for a, b in zip(u.split(8), v.split(8), strict=True):
        forth.append((pull_back(out, leaf, a) * b).flatten(2).sum(-1))
        back.append((pull_back(out, leaf, b) * a).flatten(2).sum(-1))
    uv, vu = torch.cat(forth).double(), torch.cat(back).double()
    return ratio_of((uv - vu).square().mean(0) / 4, (uv.square() + vu.square()).mean(0) / 2)


@dataclass(frozen=True)
class GaugeResidual:
    """div r + r . grad log p, where r is the model's score minus the reference's.

    Attributes:
        residual: (B,) float64; 0 everywhere when both move the density alike.
        size: |r| |grad log p| + |div r| (B,), the scale on which the residual is small or not.
    """

    residual: Tensor
    size: Tensor

    def relative(self) -> Estimate:
        """E residual^2 / E size^2, at most 1."""
        return ratio_of(self.residual.square(), self.size.square())


def gauge_residual(
    denoiser: Denoiser,
    reference: Denoiser,
    y: Tensor,
    sigma: Tensor,
    *,
    conditioning: ConditioningLike = None,
    trace: str = "exact",
    seed: int = 0,
    chunk: int = 16,
) -> GaugeResidual:
    """Whether the difference of two denoisers leaves the reference's densities as they are.

    Args:
        denoiser: The model.
        reference: A denoiser with the right score, for example an exact mixture.
        y: Positions (B, *shape).
        sigma: Levels (B,).
        conditioning: Labels (B,), -1 for none.
        trace: ``"exact"``, or ``"rademacher:m"`` or ``"gaussian:m"``, whose noise adds to the residual.
        seed: Seed of the probes.
        chunk: VJPs at a time.

    Raises:
        UserError: One of them has no score.
    """
    for model in (denoiser, reference):
        require_score(model, "a gauge residual")
    probes = trace_probes(trace, y, seed=seed)
    sides = []
    for model in (denoiser, reference):
        refuse_random_layers(model)
        sides.append(denoise_with_trace(model, y, sigma, conditioning, probes=probes, chunk=chunk))
    (ours, our_trace), (theirs, their_trace) = sides
    square = expand(sigma, y).double() ** 2
    extra = ((ours.double() - theirs.double()) / square).flatten(1)
    score = ((theirs.double() - y.double()) / square).flatten(1)
    spread = (our_trace.double() - their_trace.double()).mean(1) / sigma.double() ** 2
    size = extra.norm(dim=1) * score.norm(dim=1) + spread.abs()
    return GaugeResidual(spread + (extra * score).sum(1), size)
