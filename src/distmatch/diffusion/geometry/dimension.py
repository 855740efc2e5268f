"""How many dimensions the data have near a point, from the score at a small noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_batch, check_count, check_number
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate, mean_of
from distmatch.diffusion.conditioning import ConditioningLike, as_conditioning
from distmatch.diffusion.denoiser import Denoiser, require_score
from distmatch.diffusion.geometry.flow import FlowSolver, ScaledFlow, State
from distmatch.diffusion.geometry.jacobian import (
    denoise_with_trace,
    denoiser_jacobian,
    draw_probes,
    refuse_random_layers,
    trace_probes,
)
from distmatch.diffusion.geometry.summary import probe_error

_NOISE = 1.5  # singular values of the flow, in units of the noise, up to which a direction may be noise


@dataclass(frozen=True)
class Dimension:
    """Local intrinsic dimensions.

    Attributes:
        values: One for each point, (n,) float64 on the CPU.
        stderr: Standard error of each that random probes cause, (n,); 0 without probes, NaN for one.
        sigma: Noise level at which the data were looked at: structure below it is not seen.
        spectrum: What was counted, (n, D) in falling order, where a spectrum was; else None.
        warning: Why the values are not to be trusted, as a sentence; None when nothing speaks against them.
    """

    values: Tensor
    stderr: Tensor
    sigma: float
    spectrum: Tensor | None = None
    warning: str | None = None

    @property
    def mean(self) -> Estimate:
        """Mean over the points, with the standard error of that mean."""
        return mean_of(self.values, self.warning)


def flipd(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    *,
    conditioning: ConditioningLike = None,
    trace: str = "exact",
    seed: int = 0,
    chunk: int = 16,
) -> Dimension:
    """D + d log p_sigma(x) / d log sigma = tr J + |D(x) - x|^2 / sigma^2 (Kamkari et al. 2024, FLIPD).

    By the Fokker-Planck equation the slope is sigma^2 (div s + |s|^2): one call and its divergence.

    Args:
        denoiser: The model.
        x: Points of the data, (n, *shape), without noise.
        sigma: Level, below the curvature of the data and above their thickness and the model's errors.
        conditioning: Labels (n,), -1 for none.
        trace: ``"exact"``, ``"rademacher:m"`` or ``"gaussian:m"``.
        seed: Seed of the probes.
        chunk: VJPs at a time.

    Raises:
        UserError: The model has no score or cannot be differentiated.
    """
    _check(denoiser, x, sigma)
    probes = trace_probes(trace, x, seed=seed)
    level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
    denoised, traces = denoise_with_trace(denoiser, x, level, conditioning, probes=probes, chunk=chunk)
    traces = traces.double()
    pull = (denoised.double() - x.double()).flatten(1).square().sum(1) / sigma**2
    return Dimension(
        (traces.mean(1) + pull).cpu(), probe_error(traces, 0 if probes is None else len(probes)).cpu(), sigma
    )


def rank_gap(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    *,
    probes: int | None = None,
    threshold: float = 0.25,
    conditioning: ConditioningLike = None,
    seed: int = 0,
    chunk: int = 16,
) -> Dimension:
    """D minus the number of large singular values of the scores around ``x`` (Stanczuk et al. 2022).

    Scores at x + sigma z point back to the data: their normal parts have size 1 / sigma, the tangent ones the
    score of the density within the data. The singular values are those of sigma s / sqrt(K), of which normal
    ones are near 1 and tangent ones near 0.

    Args:
        denoiser: The model.
        x: Points of the data, (n, *shape).
        sigma: Noise level.
        probes: Points around each one, K; 4 D by default, with which sampling noise keeps normal values above
            about a half.
        threshold: Values above it count as normal.
        conditioning: Labels (n,), -1 for none.
        seed: Seed of the noise.
        chunk: Probes of all points at a time.

    Raises:
        UserError: Fewer probes than dimensions, or a model without a score.
    """
    _check(denoiser, x, sigma)
    dim = x[0].numel()
    count = 4 * dim if probes is None else probes
    check_count("the number of probes", count, dim, fix="the rank needs as many probes as dimensions")
    noise = draw_probes("gaussian", count, len(x), tuple(x.shape[1:]), seed=seed, like=x)
    cond = as_conditioning(conditioning)
    pulls = []
    for z in noise.split(chunk):
        near = (x + sigma * z).flatten(0, 1)
        level = torch.full((len(near),), sigma, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            pull = (denoiser(near, level, cond.repeat(len(z))).double() - near.double()) / sigma
        pulls.append(pull.reshape(len(z), len(x), dim))
    rows = torch.cat(pulls).transpose(0, 1)
    spectrum = torch.linalg.svdvals(rows / math.sqrt(count)).cpu()
    values = dim - (spectrum > threshold).sum(1).double()
    return Dimension(values, torch.zeros_like(values), sigma, spectrum)


def flow_jacobian(
    denoiser: Denoiser,
    y: Tensor,
    sigma_from: float,
    sigma_to: float,
    *,
    conditioning: ConditioningLike = None,
    solver: str = "rk5:64",
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """Solves the probability-flow ODE for ``y``, with the Jacobian of the map.

    Args:
        denoiser: The model.
        y: Positions (n, *shape) at ``sigma_from``.
        sigma_from: First level.
        sigma_to: Last level, above or below it, not 0.
        conditioning: Labels (n,), -1 for none.
        solver: As for :func:`~distmatch.diffusion.likelihood.log_likelihood`.
        chunk: VJPs at a time; a call needs D.

    Returns:
        Positions (n, *shape) in the dtype of ``y``, and d y_to / d y_from (n, D, D) float64.

    Raises:
        UserError: Levels that are not positive, or a model that cannot be differentiated.
    """
    if not (0 < sigma_from < math.inf and 0 < sigma_to < math.inf) or sigma_from == sigma_to:
        raise UserError("a flow needs two different positive noise levels", got=(sigma_from, sigma_to))
    refuse_random_layers(denoiser)
    flow = ScaledFlow.of(denoiser, y, max(sigma_from, sigma_to), conditioning)
    start, stop = math.log(sigma_from), math.log(sigma_to)
    dim = y[0].numel()

    def slope(t: float, state: State) -> State:
        z, tangent = state
        denoised, jacobian = denoiser_jacobian(denoiser, *flow.inputs(t, z), conditioning, chunk=chunk)
        return flow.slope(t, z, denoised), flow.pull(t) * tangent - jacobian.double() @ tangent

    eye = torch.eye(dim, dtype=torch.float64, device=y.device).expand(len(y), dim, dim)
    state = (flow.scaled(start, y), eye.clone())
    (z, tangent), _ = FlowSolver.parse(solver).integrate(slope, state, start, stop, torch.finfo(y.dtype).eps)
    grown = flow.radius(stop) / flow.radius(start)
    return flow.position(stop, z).to(y.dtype), grown * tangent


def flow_dimension(
    denoiser: Denoiser,
    y: Tensor,
    sigma: float,
    *,
    threshold: float = 10.0,
    conditioning: ConditioningLike = None,
    solver: str = "rk5:64",
    chunk: int = 16,
) -> Dimension:
    """The number of directions in which the flow from noise to data keeps a spread above the noise.

    A direction without data shrinks from sigma_max to sigma, so its singular value of the flow's Jacobian, in
    units of sigma / sigma_max, is 1; one along the data saturates at spread / sigma, which counts when it is
    above ``threshold`` (Horvat and Pfister 2024, arXiv 2402.03845).

    A spread between one and ``threshold`` times sigma is not counted, and is no noise either: the result then
    has a ``warning``. So data that are narrower than ``threshold sigma`` have dimension 0 with a warning.

    Args:
        denoiser: The model.
        y: Positions (n, *shape) at the model's ``sigma_max``.
        sigma: Level at which the flow ends.
        threshold: Smallest spread, in units of ``sigma``, that counts as a dimension.
        conditioning: Labels (n,), -1 for none.
        solver: As for :func:`flow_jacobian`.
        chunk: VJPs at a time.
    """
    _check(denoiser, y, sigma)
    high = denoiser.sigma_max
    jacobian = flow_jacobian(denoiser, y, high, sigma, conditioning=conditioning, solver=solver, chunk=chunk)[
        1
    ]
    spectrum = (torch.linalg.svdvals(jacobian) * high / sigma).cpu()
    values = (spectrum > threshold).sum(1).double()
    return Dimension(
        values, torch.zeros_like(values), sigma, spectrum, _undecided(spectrum, threshold, sigma)
    )


def _undecided(spectrum: Tensor, threshold: float, sigma: float) -> str | None:
    """A warning where values are well above that of noise, 1, and below the threshold."""
    between = (spectrum > _NOISE) & (spectrum <= threshold)
    if not bool(between.any()):
        return None
    largest = float(spectrum[between].max())
    return (
        f"{int(between.any(1).sum())} of {len(spectrum)} points have a direction whose standard "
        f"deviation, up to "
        f"{largest:.3g} sigma at sigma {sigma:.3g}, is neither noise (1 sigma) nor counted "
        f"(above {threshold:g} sigma): lower sigma"
    )


def _check(denoiser: Denoiser, x: Tensor, sigma: float) -> None:
    check_number("the noise level", sigma, "(0, inf)")
    check_batch("the points of this model", x, denoiser.shape)
    check_count("the number of points", len(x))
    require_score(denoiser, "an estimate of the dimension")
    refuse_random_layers(denoiser)
