"""Dimension, flows and the ladder of likelihoods against closed forms. Seeds fixed; float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.geometry.dimension import flipd, flow_dimension, flow_jacobian, rank_gap
from distmatch.diffusion.geometry.fields import gauge_residual
from distmatch.diffusion.geometry.fokker_planck import score_residual
from distmatch.diffusion.geometry.singular import nll_ladder
from distmatch.diffusion.likelihood import log_likelihood
from distmatch.diffusion.mixture import GaussianMixture

PAIR = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [0.8, 0.5]], [[0.2, 0.05], [0.4, 0.3]], [0, 1])


def plane(k: int, dim: int, modes: int = 2) -> GaussianMixture:
    """Data on a k-plane through the origin of R^dim, in general position."""
    g = torch.Generator().manual_seed(k)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0][:, :k]
    roots = torch.randn(modes, k, k, generator=g, dtype=torch.float64) + 2 * torch.eye(k, dtype=torch.float64)
    means = torch.randn(modes, k, generator=g, dtype=torch.float64) @ basis.T
    lifted = basis @ roots
    return GaussianMixture([1 / modes] * modes, means, lifted @ lifted.mT)


def on_plane(teacher: GaussianMixture, n: int) -> Tensor:
    """Samples without the rounding to float32, which would leave the plane."""
    x = teacher.sample(n)
    basis = teacher.covariances[0] + teacher.covariances[1]
    values, vectors = torch.linalg.eigh(basis)
    tangent = vectors[:, values > 1e-9]
    return x.double() @ tangent @ tangent.T


def places(n: int, dim: int, sigma: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(n, dim, generator=g, dtype=torch.float64) * math.hypot(1.0, sigma)
    return y, torch.full((n,), sigma, dtype=torch.float64)


# Dimension.


@pytest.mark.parametrize(("k", "dim"), [(0, 3), (1, 3), (2, 5), (5, 8), (4, 4)])
def test_all_estimates_find_the_dimension_of_a_plane(k: int, dim: int) -> None:
    sigma = 0.01
    if k == 0:
        teacher = GaussianMixture([1.0], [[0.5] * dim], [0.0])
        x = torch.full((8, dim), 0.5, dtype=torch.float64)
    else:
        teacher = plane(k, dim)
        x = on_plane(teacher, 8)
    exact = flipd(teacher, x, sigma)
    assert float((exact.values - k).abs().max()) < 0.05
    assert exact.mean.value == pytest.approx(k, abs=0.05)
    gap = rank_gap(teacher, x, sigma, chunk=5)
    assert gap.values.tolist() == [k] * 8
    start = 80 * torch.randn(4, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flow = flow_dimension(teacher, start, sigma, solver="rk5:32")
    assert flow.values.tolist() == [k] * 4
    assert flow.spectrum is not None
    assert flow.spectrum.shape == (4, dim)


@pytest.mark.statistical
def test_flipd_is_the_slope_of_the_log_density() -> None:
    x, step = places(10, 2, 0.1)[0], 1e-5
    for conditioning in (None, torch.arange(10) % 2):
        high, low = (PAIR.log_prob(x, 0.2 * math.exp(s), conditioning) for s in (step, -step))
        expected = 2 + (high - low) / (2 * step)
        result = flipd(PAIR, x, 0.2, conditioning=conditioning)
        torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=1e-6)
    probed = flipd(PAIR, x, 0.2, trace="rademacher:256")
    assert bool(((probed.values - flipd(PAIR, x, 0.2).values).abs() < 4.5 * probed.stderr + 1e-12).all())


def test_the_rank_gap_spectrum_is_that_of_normal_and_tangent_scores() -> None:
    teacher = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]])
    sigma, x = 0.1, torch.zeros(2, 3, dtype=torch.float64)
    spectrum = rank_gap(teacher, x, sigma, probes=20_000, chunk=20_000).spectrum
    assert spectrum is not None
    # sigma s = -z for normal parts and -z sigma^2 / (1 + sigma^2) for the tangent one; z has 20000 draws.
    expected = torch.tensor([1.0, 1.0, 0.01 / 1.01]).double()
    torch.testing.assert_close(spectrum[0], expected, rtol=0.03, atol=0)


def test_the_flow_jacobian_is_that_of_the_map() -> None:
    y, _ = places(4, 2, 3.0)
    step, steps = 1e-5, "rk5:32"
    end, jacobian = flow_jacobian(PAIR, y, 3.0, 0.2, solver=steps)
    for j in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[j]
        ahead, behind = (flow_jacobian(PAIR, y + s * shift, 3.0, 0.2, solver=steps)[0] for s in (1, -1))
        torch.testing.assert_close(jacobian[:, :, j], (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)
    back, inverse = flow_jacobian(PAIR, end, 0.2, 3.0, solver=steps)
    torch.testing.assert_close(back, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse @ jacobian, torch.eye(2).double().expand(4, 2, 2), rtol=0, atol=1e-5)
    # The change of density along the flow is the determinant.
    change = PAIR.log_prob(y, 3.0) - PAIR.log_prob(end, 0.2)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], change, rtol=1e-5, atol=1e-5)


def test_the_flow_of_a_gaussian_is_its_closed_form() -> None:
    teacher = GaussianMixture([1.0], [[0.5, 0.0]], [[0.3, 2.0]])
    y, _ = places(3, 2, 3.0)
    _, jacobian = flow_jacobian(teacher, y, 3.0, 0.1, solver="dop853:1e-9")
    v = torch.tensor([0.3, 2.0], dtype=torch.float64)
    expected = torch.diag(((v + 0.01) / (v + 9)).sqrt()).expand(3, 2, 2)
    torch.testing.assert_close(jacobian, expected, rtol=1e-7, atol=1e-7)


def test_the_ladder_of_likelihoods_shows_the_codimension() -> None:
    teacher = plane(2, 5)
    x = on_plane(teacher, 400)
    ladder = nll_ladder(teacher.log_prob, x, [0.003, 0.01, 0.03])
    # Each slope has E = 3 and the noise of |e|^2 cancels, because all rungs share their e.
    assert ladder.codimension.value == pytest.approx(3, abs=0.01)
    assert [r.value for r in ladder.nll] == sorted(r.value for r in ladder.nll)
    full = nll_ladder(PAIR.log_prob, PAIR.sample(400).double(), [0.001, 0.003])
    assert full.codimension.value == pytest.approx(0, abs=0.01)
    few = x[:6]
    by_flow = nll_ladder(
        lambda y, s: log_likelihood(teacher, y, sigma=s, solver="rk5:64", prior="moments").log_prob,
        few,
        [0.01, 0.03],
    )
    exact = nll_ladder(teacher.log_prob, few, [0.01, 0.03])
    torch.testing.assert_close(by_flow.slopes, exact.slopes, rtol=0, atol=1e-3)


def test_geometry_mistakes_are_explained() -> None:
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(UserError, match="positive"):
        flipd(PAIR, x, 0.0)
    with pytest.raises(UserError, match="points of this model"):
        flipd(PAIR, x[:, :1], 0.1)
    with pytest.raises(UserError, match="as many probes"):
        rank_gap(PAIR, x, 0.1, probes=1)
    with pytest.raises(UserError, match="two different"):
        flow_jacobian(PAIR, x, 1.0, 1.0)
    with pytest.raises(UserError, match="two or more"):
        nll_ladder(PAIR.log_prob, x, [0.1])
    scoreless = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    scoreless.gaussian_kernel = False  # type: ignore[assignment]
    ones = torch.ones(2, dtype=torch.float64)
    for call in (
        lambda: flipd(scoreless, x, 0.1),
        lambda: score_residual(scoreless, x, ones),
        lambda: gauge_residual(PAIR, scoreless, x, ones),
    ):
        with pytest.raises(UserError, match="score"):
            call()


def test_a_flow_dimension_says_where_the_level_is_too_high_to_count() -> None:
    """A plane of spreads 1 and 0.5 in three dimensions: 2 at a level far below, and no silent 0 above."""
    plane = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [[1.0, 0.25, 0.0]])
    start = 80 * torch.eye(3, dtype=torch.float64)
    seen = flow_dimension(plane, start, 0.01, solver="rk5:32")
    assert seen.values.tolist() == [2.0] * 3
    assert seen.warning is None
    for level, count in ((0.07, 1.0), (0.2, 0.0)):
        blurred = flow_dimension(plane, start, level, solver="rk5:32")
        assert blurred.values.tolist() == [count] * 3
        assert "lower sigma" in str(blurred.mean.warning)
    point = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [0.0])  # without any spread 0 is right
    assert flow_dimension(point, start, 0.01, solver="rk5:32").warning is None
