"""Log-likelihood of data under a diffusion model, by the change of density along its probability-flow ODE.

Along dy/dsigma = (y - D) / sigma, with J = dD/dy, the log-density changes at the rate -(d - tr J) / sigma, so

    log p(x at sigma) = log p(y at sigma_max) + integral of (d - tr J) dlog sigma

(Song et al. 2021, "Score-based generative modeling through SDEs", section 4.3). The result is the density of
the data noised to level ``sigma``; there is none at level 0 unless the data have a density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.base.checks import check_batch, check_count, check_finite, check_rising
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate, mean_of
from distmatch.base.seeds import generator
from distmatch.diffusion.conditioning import ConditioningLike, conditioning_for
from distmatch.diffusion.denoiser import Denoiser, has_score
from distmatch.diffusion.geometry.flow import FlowSolver, ScaledFlow, State
from distmatch.diffusion.geometry.jacobian import (
    connected,
    denoise_with_trace,
    parse_trace,
    refuse_random_layers,
    slopes,
    trace_probes,
)
from distmatch.diffusion.geometry.summary import probe_error
from distmatch.diffusion.priors import Prior, prior_density


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihoods and what they rest on.

    Attributes:
        log_prob: Nats for each sample, (n,) float64 on the CPU.
        stderr: Standard error of each that random probes cause, (n,); 0 for exact traces, NaN for one probe.
        prior_gap: |y . (s - s_prior)| at ``sigma_max``, (n,): by how many nats each ``log_prob`` may be off
            because the prior is not the model's own distribution there. NaN where the model has no score.
        latents: Where the flow took each sample, (n, *shape) at ``sigma_max``.
        dim: Numbers in a sample.
        sigma: Level at which the density was taken.
        sigma_max: Level of the prior.
        calls: Network calls for each sample, without those for ``prior_gap`` and for the center of the
            coordinates; in a batched adaptive solve the largest.
        vjps: Vector-Jacobian products for each sample.
    """

    log_prob: Tensor
    stderr: Tensor
    prior_gap: Tensor
    latents: Tensor
    dim: int
    sigma: float
    sigma_max: float
    calls: int
    vjps: int

    @property
    def mean(self) -> Estimate:
        """Mean log-likelihood in nats; its standard error includes that of the probes."""
        return mean_log_likelihood(self.log_prob)

    def bits_per_dim(self, raw_per_unit: float | Sequence[float] = 1.0) -> Estimate:
        """-log2 p / dim, in the units of the raw data.

        Args:
            raw_per_unit: Raw units in one unit of the model; for vectors one for each column. That is
                ``half`` of a :class:`~distmatch.data.scaling.Scaling`: 127.5 (6.994 bits) for bytes mapped
                from 0..255 to [-1, 1]. Papers that map (k + u) / 256 to [-1, 1] have 128, that is 7 bits.

        Returns:
            The mean over the samples. For integers that were dequantized it bounds the bits of the integers
            from above.

        Raises:
            UserError: A scale is not positive, or there are not as many as columns.
        """
        scale = torch.as_tensor(raw_per_unit, dtype=torch.float64).reshape(-1)
        if len(scale) not in (1, self.dim) or not bool((scale > 0).all()):
            raise UserError(
                "raw_per_unit must be one positive number, or one for each column",
                got=raw_per_unit,
                expected=f"1 or {self.dim} numbers",
            )
        return mean_log_likelihood(-self.log_prob / (self.dim * math.log(2)) + scale.log2().mean())


def mean_log_likelihood(values: Tensor) -> Estimate:
    """The mean of log-likelihoods (n,), with a warning where one is not finite."""
    return mean_of(values, None if bool(values.isfinite().all()) else "some log-likelihoods are not finite")


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    conditioning: ConditioningLike = None,
    sigma: float | None = None,
    sigma_max: float | None = None,
    trace: str = "exact",
    solver: str = "rk5:64",
    prior: str | Prior = "data",
    seed: int = 0,
    batch: int = 256,
    chunk: int = 16,
) -> LogLikelihood:
    """Log p(x) in nats under the flow of ``denoiser``.

    Args:
        denoiser: The model, differentiable with respect to its input. The density is that of its flow, which
            is that of its score only if the one comes from the other: a guided denoiser has a flow and a
            density of its samples, but they are not those of the tilted distribution.
        x: Samples, (n, *shape), at level ``sigma``.
        conditioning: Labels (n,), -1 for none.
        sigma: Level of the density; by default the model's ``sigma_min``.
        sigma_max: Level of the prior; by default the model's.
        trace: ``"exact"`` (d VJPs a call), ``"rademacher:m"`` or ``"gaussian:m"`` (m VJPs; frozen within a
            solve; 2 or more give a standard error).
        solver: ``"rk4:steps"``, ``"rk5:steps"`` (4 and 6 calls per step), ``"rk45:tolerance"`` or
            ``"dop853:tolerance"``.
        prior: The distribution at ``sigma_max``: ``"data"`` is N(0, sigma_max^2 + sigma_data^2),
            ``"sampler"`` is N(0, sigma_max^2), where samplers start, so that the density is exactly that of
            the generator, ``"moments"`` matches mean and covariance of the model (D VJPs once), or a function
            of positions and labels that gives nats (B,).
        seed: Seed of the probes; those of sample i depend on the seed and i alone.
        batch: Samples per batch.
        chunk: VJPs at a time.

    Raises:
        UserError: Arguments that do not fit, or a denoiser that cannot be differentiated.
    """
    low = denoiser.sigma_min if sigma is None else sigma
    high = denoiser.sigma_max if sigma_max is None else sigma_max
    _check(denoiser, x, low, high)
    conditioning = conditioning_for(denoiser, conditioning, len(x))
    check_count("batch", batch)
    refuse_random_layers(denoiser)
    _, count = parse_trace(trace)
    method = FlowSolver.parse(solver)
    density = prior_density(prior, denoiser, high, dtype=x.dtype, chunk=chunk)
    dim = x[0].numel()
    parts: list[tuple[Tensor, ...]] = []
    most = 0
    for first in range(0, len(x), batch):
        rows = x[first : first + batch]
        cond = conditioning.index(slice(first, first + batch))
        probes = trace_probes(trace, rows, seed=seed, first=first)
        flow = ScaledFlow.of(denoiser, rows, high, cond)
        start: State = (
            flow.scaled(math.log(low), rows),
            torch.zeros(len(rows), max(count, 1), dtype=torch.float64, device=x.device),
        )
        slope = _density_slope(flow, cond, probes, chunk)
        eps = torch.finfo(x.dtype).eps
        (z, change), calls = method.integrate(slope, start, math.log(low), math.log(high), eps)
        most = max(most, calls)
        y = flow.position(math.log(high), z)
        prior_value, gap = _prior_and_gap(density, denoiser, y, high, cond, x.dtype)
        scale = dim * math.log(flow.radius(math.log(high)) / flow.radius(math.log(low)))
        value = prior_value + change.mean(1) + scale
        error = probe_error(change, count)
        parts.append((value.cpu(), error.cpu(), gap.cpu(), y.to(x.dtype).cpu()))
    value, error, gap, y = (torch.cat(column) for column in zip(*parts, strict=True))
    return LogLikelihood(value, error, gap, y, dim, low, high, most, most * (count or dim))


def _density_slope(
    flow: ScaledFlow, conditioning: ConditioningLike, probes: Tensor | None, chunk: int
) -> Callable[[float, State], State]:
    """The slope of z and of the log-density, the latter without d dlog c, whose integral is known."""

    def slope(t: float, state: State) -> State:
        y, level = flow.inputs(t, state[0])
        denoised, trace = denoise_with_trace(
            flow.denoiser, y, level, conditioning, probes=probes, chunk=chunk
        )
        free = flow.pull(t) * state[0][0].numel()
        return flow.slope(t, state[0], denoised), free - trace.double()

    return slope


def _prior_and_gap(
    density: Prior,
    denoiser: Denoiser,
    y: Tensor,
    sigma: float,
    conditioning: ConditioningLike,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Log prior at ``y`` in nats, (B,), and |y . (s - s_prior)|, (B,)."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = connected(density(leaf, conditioning), leaf, lambda z: density(z, conditioning), "this prior")
        (slope,) = slopes(value, (leaf,))
    if not has_score(denoiser):
        return value.detach(), torch.full_like(value, math.nan)
    with torch.no_grad():
        level = torch.full((len(y),), sigma, dtype=dtype, device=y.device)
        score = (denoiser(y.to(dtype), level, conditioning).double() - y) / sigma**2
    return value.detach(), ((score - slope) * y).flatten(1).sum(1).abs()


def class_log_likelihoods(denoiser: Denoiser, x: Tensor, **options: Any) -> Tensor:
    """Takes log p(x | c) in nats for every class c, (n, classes) float64; their softmax classifies ``x``.

    Args:
        denoiser: A class-conditional model.
        x: Samples, (n, *shape).
        options: Those of :func:`log_likelihood` but ``conditioning``. All classes share their probes.

    Raises:
        UserError: The model has no classes.
    """
    if denoiser.num_classes == 0:
        raise UserError("this model has no classes", fix="use log_likelihood")
    columns = [
        log_likelihood(
            denoiser, x, conditioning=torch.full((len(x),), c, device=x.device), **options
        ).log_prob
        for c in range(denoiser.num_classes)
    ]
    return torch.stack(columns, dim=1)


def dequantize(levels: Tensor, *, seed: int = 0) -> Tensor:
    """Integers plus uniform noise in [-1/2, 1/2): a density of these bounds the mass of the integers.

    Args:
        levels: Integers in raw units, any shape, for example bytes 0..255; scale them after this.
        seed: Seed of the noise.

    Returns:
        float64, same shape and device.

    Raises:
        UserError: The values are not integers.
    """
    if levels.is_floating_point():
        raise UserError(
            "only integers are dequantized", got=levels.dtype, fix="pass the raw data, before scaling"
        )
    noise = torch.rand(levels.shape, generator=generator(seed, "dequantise"), dtype=torch.float64)
    return levels.double() + (noise - 0.5).to(levels.device)


def _check(denoiser: Denoiser, x: Tensor, low: float, high: float) -> None:
    check_batch("the samples of this model", x, denoiser.shape)
    check_count("the number of samples", len(x))
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError("a likelihood needs float32 or float64 samples", got=x.dtype, fix="call .float()")
    check_finite("these samples", x)
    check_rising(sigma=low, sigma_max=high)
