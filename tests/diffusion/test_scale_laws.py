"""Data in another unit, or far from the origin: everything follows them, in float32 as in float64.

Data times c are an exact mixture with means times c and covariances times c^2, at noise levels times c; what
is computed of them is c to some power times what it was. Data plus b have the same levels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.composition.feynman_kac import feynman_kac
from distmatch.diffusion.composition.superdiff import superpose
from distmatch.diffusion.composition.targets import annealed, product
from distmatch.diffusion.control.linear import linear_map
from distmatch.diffusion.control.translate import translate
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.geometry.dimension import flipd, flow_dimension, rank_gap
from distmatch.diffusion.geometry.fields import curl_share
from distmatch.diffusion.geometry.fokker_planck import score_residual
from distmatch.diffusion.guidance import (
    ClassifierGuided,
    GradientFree,
    Guided,
    NoisyClassifier,
    fit_noisy_classifier,
    minority_score,
)
from distmatch.diffusion.guidance.reflection import solve_reflected
from distmatch.diffusion.interpolant_sampling import transport
from distmatch.diffusion.interpolants import Interpolant
from distmatch.diffusion.ito import trajectory_log_density
from distmatch.diffusion.likelihood import log_likelihood
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.paths.kinetic import kinetic_path_of
from distmatch.diffusion.priors import gaussian_prior
from distmatch.diffusion.solvers import grid, solve
from tests.reference.solver_cases import DETERMINISTIC, STOCHASTIC

N = 24
MEANS = torch.tensor([[-1.0, 0.2], [0.8, -0.5]], dtype=torch.float64)
SPREADS = torch.tensor([0.1, 0.3], dtype=torch.float64)
START = 20 * torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(N) % 2
NOISE = SampleNoise(0, torch.arange(N), (2,))
LEVELS = grid("karras", 10, 0.02, 20.0)
few = settings(max_examples=6, derandomize=True, deadline=None)
scales = st.floats(-3, 4).map(lambda power: 10.0**power)
offsets = st.floats(-1e4, 1e4)  # in units of the data
dtypes = st.sampled_from([torch.float32, torch.float64])


def mixture(scale: float = 1.0, offset: float = 0.0, widen: float = 1.0) -> GaussianMixture:
    ends = {"sigma_min": 0.02 * scale, "sigma_max": 20 * scale}
    return GaussianMixture(
        [0.3, 0.7], scale * MEANS + offset, widen * scale**2 * SPREADS, [0, 1], **ends
    ).eval()


def assert_same(ours: Tensor, reference: Tensor, scale: float, offset: float, dtype: torch.dtype) -> None:
    """``ours``, of data times scale plus offset, against ``reference``: to the digits of the numbers."""
    # 1000 roundings of numbers of this size; solvers do not add them up.
    size = scale * 3 + abs(offset)
    close = 1000 * torch.finfo(dtype).eps * size
    torch.testing.assert_close(ours.double(), scale * reference.double() + offset, rtol=0, atol=close)


# Solvers.

SOLVERS = [*DETERMINISTIC, *STOCHASTIC, "rk45:1e-4:1e-4"]
PLAIN = {
    name: solve(mixture(), START, LEVELS, name, conditioning=LABELS, noise=NOISE, path="edm").y
    for name in SOLVERS
}


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=3, derandomize=True, deadline=None)
@example(scale=1.0, offset=1e4, dtype=torch.float32)
@example(scale=1e-3, offset=-1e4, dtype=torch.float64)
@given(scale=scales, offset=offsets, dtype=dtypes)
def test_solvers(name: str, scale: float, offset: float, dtype: torch.dtype) -> None:
    offset = offset * scale
    start = (scale * START + offset).to(dtype)
    model = mixture(scale, offset)
    done = solve(model, start, scale * LEVELS, name, conditioning=LABELS, noise=NOISE, path="edm")
    if name.startswith("rk45"):  # rounding may change the steps that it chooses
        torch.testing.assert_close(done.y.double(), scale * PLAIN[name] + offset, rtol=0, atol=0.01 * scale)
        return
    assert_same(done.y, PLAIN[name], scale, offset, dtype)


def test_an_exact_mixture_keeps_the_digits_of_float32_far_from_the_origin() -> None:
    """Means that float32 cannot hold, and positions that it can: all of one number's rounding, no more."""
    model = mixture(offset=1e4 + 0.1234)
    x = (MEANS[LABELS] + START / 60 + 1e4).float()
    for sigma in (0.02, 1.0):
        score, density = (f(x, sigma, LABELS).double() for f in (model.score, model.log_prob))
        torch.testing.assert_close(score, model.score(x.double(), sigma, LABELS), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(density, model.log_prob(x.double(), sigma, LABELS), rtol=2e-5, atol=2e-5)
        clean = model(x, torch.full((N,), sigma), LABELS)
        exact = model(x.double(), torch.full((N,), sigma).double(), LABELS)
        half = 2.0**-11 * 1.001  # of the gap between float32 numbers at 1e4
        torch.testing.assert_close(clean.double(), exact, rtol=0, atol=half)


# Guidance.

WEAK = mixture(widen=2.0)


def bayes(scale: float, offset: float) -> Any:
    """The exact classifier of the mixture's classes."""
    parts = [GaussianMixture([1.0], scale * MEANS[[k]] + offset, scale**2 * SPREADS[[k]]) for k in (0, 1)]

    def logits(x: Tensor, sigma: Tensor) -> Tensor:
        prior = torch.tensor([0.3, 0.7], dtype=x.dtype).log()
        return prior + torch.stack([p.log_prob(x, sigma) for p in parts], dim=1)

    return logits


def clean_bayes(scale: float, offset: float) -> Any:
    return lambda x: bayes(scale, offset)(x, torch.full((len(x),), 0.1 * scale, dtype=x.dtype))


def wrappers(scale: float, offset: float) -> dict[str, Denoiser]:
    model, weak = mixture(scale, offset), mixture(scale, offset, widen=2.0)
    inside = (0.2 * scale, 3 * scale)
    return {
        "classifier-free": Guided(model, 2.0),
        "in an interval": Guided(model, 2.0, interval=inside),
        "autoguidance": Guided(model, 2.0, reference=weak),
        "classifier": ClassifierGuided(model, bayes(scale, offset), 1.5, num_classes=2, conditional=False),
        "gradient-free": GradientFree(model, clean_bayes(scale, offset), 2.0, reference=weak),
    }


@pytest.mark.parametrize("name", wrappers(1.0, 0.0))
@settings(max_examples=4, derandomize=True, deadline=None)
@example(scale=1.0, offset=1e4, dtype=torch.float32)
@given(scale=scales, offset=offsets, dtype=dtypes)
def test_guidance(name: str, scale: float, offset: float, dtype: torch.dtype) -> None:
    offset, sigma = offset * scale, torch.tensor([5.0, 1.0, 0.5, 0.2], dtype=torch.float64).repeat(6)
    x = MEANS[LABELS] + sigma[:, None] * START / 20
    plain = wrappers(1.0, 0.0)[name](x, sigma, LABELS)
    # A class is decided by a difference of squares: the digits of the offset count as often as those are.
    digits = 30 if name in ("classifier", "gradient-free") else 1
    ours = wrappers(scale, offset)[name]((scale * x + offset).to(dtype), (scale * sigma).to(dtype), LABELS)
    torch.testing.assert_close(
        ours.double(), scale * plain + offset, rtol=0,
        atol=digits * 1000 * torch.finfo(dtype).eps * (3 * scale + abs(offset)),
    )  # fmt: skip


@few
@given(scale=scales)
def test_reflection_and_minority_scores(scale: float) -> None:
    pair = mixture(), WEAK
    plain = solve_reflected(*pair, START, LEVELS, conditioning=LABELS).y
    wide = solve_reflected(
        mixture(scale), mixture(scale, widen=2.0), scale * START, scale * LEVELS, conditioning=LABELS
    )
    torch.testing.assert_close(wide.y, scale * plain, rtol=1e-9, atol=1e-9 * scale)
    x = MEANS[LABELS]
    score = minority_score(mixture(scale), scale * x, 0.5 * scale)  # a squared distance
    torch.testing.assert_close(score, scale**2 * minority_score(mixture(), x, 0.5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_a_noisy_classifier_learns_the_same_in_any_unit(scale: float) -> None:
    x0, labels = mixture().sample(256, seed=1), torch.arange(256) % 2
    sigma = torch.logspace(-2, 1, 256)
    logits = []
    for unit in (1.0, scale):
        torch.manual_seed(0)
        net = NoisyClassifier(2, (2,), sigma_data=unit * mixture().sigma_data, width=16, depth=1)
        fit_noisy_classifier(net, unit * x0, labels, steps=30)
        logits.append(net(unit * x0, unit * sigma))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-3)


# Likelihood and geometry.


def exact_prior(scale: float, offset: float) -> Any:
    model = mixture(scale, offset)
    return gaussian_prior((20 * scale) ** 2 + model.sigma_data**2, offset)


@settings(max_examples=4, derandomize=True, deadline=None)
@example(scale=1.0, offset=1e4, dtype=torch.float64)
@example(scale=1.0, offset=1e4, dtype=torch.float32)
@given(scale=scales, offset=offsets, dtype=dtypes)
def test_likelihood(scale: float, offset: float, dtype: torch.dtype) -> None:
    """Log p falls by D log c, and does not see an offset that the prior has too."""
    offset = offset * scale
    x = MEANS[LABELS] + START / 60
    options: dict[str, Any] = {"conditioning": LABELS, "solver": "rk4:8"}
    plain = log_likelihood(mixture(), x, prior=exact_prior(1.0, 0.0), **options)
    ours = log_likelihood(
        mixture(scale, offset), (scale * x + offset).to(dtype), prior=exact_prior(scale, offset), **options
    )
    digits = 100 * torch.finfo(dtype).eps * (1 + abs(offset) / scale) + 1e-10
    torch.testing.assert_close(ours.log_prob, plain.log_prob - 2 * math.log(scale), rtol=0, atol=digits)


def test_an_adaptive_likelihood_takes_the_same_steps_in_any_unit_and_anywhere() -> None:
    x = MEANS[LABELS][:8] + START[:8] / 60
    found = [
        log_likelihood(
            mixture(c, b), c * x + b, prior=exact_prior(c, b), conditioning=LABELS[:8], solver="rk45:1e-6"
        )
        for c, b in ((1.0, 0.0), (1e4, 1e8), (1e-3, -10.0))
    ]
    for c, other in zip((1e4, 1e-3), found[1:], strict=True):
        assert other.calls == found[0].calls
        expected = found[0].log_prob - 2 * math.log(c)
        torch.testing.assert_close(other.log_prob, expected, rtol=0, atol=1e-8)


@few
@given(scale=scales)
def test_densities_along_a_trajectory(scale: float) -> None:
    levels, states = LEVELS[:-1], solve(mixture(), START, LEVELS[:-1], "heun", trajectory=True).trajectory
    assert states is not None
    way, wide = (
        trajectory_log_density(mixture(c), c * states, c * levels, noise_ratio=0.0, prior=exact_prior(c, 0.0))
        for c in (1.0, scale)
    )
    torch.testing.assert_close(wide, way - 2 * math.log(scale), rtol=1e-8, atol=1e-8)


@few
@given(scale=scales)
def test_geometry_has_its_degree(scale: float) -> None:
    x = MEANS[LABELS] + START / 60
    sigma = torch.full((N,), 0.3, dtype=torch.float64)
    for measure in (flipd, rank_gap):
        plain, wide = (measure(mixture(c), c * x, 0.05 * c) for c in (1.0, scale))  # type: ignore[operator]
        torch.testing.assert_close(wide.values, plain.values, rtol=1e-8, atol=1e-8)
    plain, wide = (flow_dimension(mixture(c), c * START[:3], 0.05 * c, solver="rk4:8") for c in (1.0, scale))
    torch.testing.assert_close(wide.spectrum, plain.spectrum, rtol=1e-7, atol=1e-7)
    assert curl_share(mixture(scale), scale * x, scale * sigma).value < 1e-12
    plain, wide = (score_residual(mixture(c), c * x, c * sigma) for c in (1.0, scale))
    torch.testing.assert_close(wide.rate * scale**2, plain.rate, rtol=1e-8, atol=1e-8)
    assert wide.relative().value < 1e-9


# Composition and control.


@few
@given(scale=scales, offset=st.floats(-30, 30), dtype=dtypes)
def test_composition(scale: float, offset: float, dtype: torch.dtype) -> None:
    """Samples of several models follow the data; densities and weights stay what they are."""
    shifted = offset * scale
    levels = LEVELS[:-1]

    def ways(c: float, b: float, kind: torch.dtype) -> list[Tensor]:
        pair = [mixture(c, b), mixture(c, b, widen=2.0)]
        start = (c * START + b).to(kind)
        prior = exact_prior(c, b)
        both = superpose(pair, start, c * levels, NOISE, "or", prior=prior).y
        alike = superpose(pair, start, c * levels, NOISE, "and", prior=prior).y
        sharp = feynman_kac(annealed(pair[0], 1.5), c * levels, NOISE, start=start, resample_below=0)
        shared = feynman_kac(product(pair), c * levels, NOISE, start=start, resample_below=0)
        moved = translate(*pair, (c * MEANS[LABELS] + b).to(kind), c * LEVELS, NOISE, eta=0.5)
        return [both, alike, sharp.y, shared.y, moved, sharp.log_w, shared.log_w]

    plain, ours = ways(1.0, 0.0, torch.float64), ways(scale, shifted, dtype)
    # The noise of a reverse SDE forgets rounding; densities along the way add it up.
    digits = max(3000 * torch.finfo(dtype).eps, 1e-9) * (1 + abs(offset))
    for mine, reference in zip(ours[:5], plain[:5], strict=True):
        torch.testing.assert_close((mine.double() - shifted) / scale, reference, rtol=0, atol=digits)
    for mine, reference in zip(ours[5:], plain[5:], strict=True):
        torch.testing.assert_close(mine, reference, rtol=digits, atol=digits)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_mixture_and_a_measurement_are_checked_in_their_own_unit(scale: float) -> None:
    with pytest.raises(UserError, match="symmetric"):
        GaussianMixture([1.0], [[0.0, 0.0]], scale**2 * torch.tensor([[[1.0, 0.3], [0.2, 1.0]]]))
    with pytest.raises(UserError, match="semi-definite"):
        GaussianMixture([1.0], [[0.0, 0.0]], scale**2 * torch.tensor([[[1.0, 0.0], [0.0, -1e-3]]]))
    with pytest.raises(UserError, match="covariance matrix"):
        mixture(scale).condition_on([[1.0, 0.0]], [0.0], [[-1e-3 * scale**2]])
    with pytest.raises(UserError, match="not linear"):
        linear_map(lambda x: scale * x.abs(), (2,))
    assert not linear_map(lambda x: 1e-9 * scale * x.cumsum(1), (2,)).orthonormal


# Paths and interpolants.


@few
@given(scale=scales)
def test_paths_and_interpolants(scale: float) -> None:
    data = mixture().sample(200, seed=3).double()
    plain, wide = kinetic_path_of(data), kinetic_path_of(scale * data)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(wide.rho(t), scale * plain.rho(t), rtol=1e-6, atol=0)
    for name in ("trigflow", "edm"):
        ends = (
            {"sigma_data": scale, "rho_max": 80 * scale} if name == "trigflow" else {"sigma_max": 80 * scale}
        )
        low = {"rho_min" if name == "trigflow" else "sigma_min": 0.002 * scale}
        assert noise_path(name, **ends, **low).rho_max == pytest.approx(80 * scale)
    for kind, gamma in (("linear", "brownian"), ("linear", "sine"), ("encoding-decoding", "quadratic")):
        ends = []
        for c in (1.0, scale):
            way = Interpolant(kind, gamma, scale=c**2)
            torch.testing.assert_close(way.at(t).gamma, c * Interpolant(kind, gamma).at(t).gamma)
            times, x = torch.linspace(0.1, 0.9, 9), c * START / 20
            done = transport(
                lambda x, t, c=c: c * torch.tanh(x / c), x, times,
                interpolant=way, noise=lambda x, t, c=c: torch.tanh(x / c), diffusion=0.3 * c**2, draws=NOISE,
            )  # fmt: skip
            ends.append(done / c)
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)
