"""Discrete-time teachers: their rates, their levels, the path through them."""

from __future__ import annotations

import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.diffusion.paths import betas, discrete_path


def test_rates_of_the_published_teachers() -> None:
    """First and last noise-to-signal ratio of DDPM (0.0100, 157.4) and latent diffusion (0.0292, 14.6146)."""
    for kind, first, last in (("linear", 0.0100005, 157.407), ("scaled-linear", 0.0291671, 14.6146)):
        path = discrete_path((1 - betas(kind)).cumprod(0))
        assert path.rho_min == pytest.approx(first, rel=1e-5)
        assert path.rho_max == pytest.approx(last, rel=1e-5)
    rates = betas("scaled-linear", 1000)
    assert float(rates[0]) == pytest.approx(0.00085)
    assert float(rates[-1]) == pytest.approx(0.012)
    assert torch.allclose(rates.sqrt().diff(), rates.sqrt().diff()[:1], rtol=1e-9)


def test_cosine_rates_follow_the_cosine_until_the_cap() -> None:
    steps, k = 100, 0.008
    rates = betas("cosine", steps, k=k)
    angle = [math.pi / 2 * (i / steps + k) / (1 + k) for i in range(steps + 1)]
    signal = torch.tensor([math.cos(a) ** 2 / math.cos(angle[0]) ** 2 for a in angle], dtype=torch.float64)
    torch.testing.assert_close((1 - rates).cumprod(0)[:-1], signal[1:-1], rtol=1e-12, atol=0)
    assert float(rates[-1]) == 0.999  # without the cap it is 1 and nothing of the signal is left
    assert float(betas("cosine", steps, cap=0.5).max()) == 0.5


def test_linear_rates_of_other_lengths_end_at_about_the_same_level() -> None:
    logs = [float((1 - betas("linear", n)).log().sum()) for n in (250, 1000, 4000)]
    assert max(logs) - min(logs) < 0.1 * abs(logs[1])
    assert float(betas("linear", 250, start=1e-4, end=0.02)[-1]) == pytest.approx(0.02)


def test_the_path_goes_through_the_levels() -> None:
    squares = (1 - betas("linear", 200)).cumprod(0)
    path = discrete_path(squares)
    t = torch.arange(200, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2, squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.sigma(t) ** 2, 1 - squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.levels, ((1 - squares) / squares).sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(path.t_of_rho(path.levels), t, rtol=1e-12, atol=1e-12)
    # Half way between two levels is their geometric mean; beyond the ends the path goes on.
    middle = (path.levels[3] * path.levels[4]).sqrt()
    assert float(path.t_of_rho(middle)) == pytest.approx(3.5, rel=1e-12)
    for rho in (path.rho_min / 2, path.rho_max * 2):
        outside = path.t_of_rho(rho)
        assert not 0 <= float(outside) <= 199
        assert float(path.rho(outside)) == pytest.approx(rho, rel=1e-10)


def test_derivatives_are_those_of_autograd_between_the_levels() -> None:
    path = discrete_path((1 - betas("scaled-linear", 50)).cumprod(0))
    t = (torch.arange(49, dtype=torch.float64) + 0.37).requires_grad_()
    c = path.coefficients(t.detach())
    for own, curve in ((c.d_alpha, path.alpha), (c.d_sigma, path.sigma)):
        (slope,) = torch.autograd.grad(curve(t).sum(), t)
        torch.testing.assert_close(own, slope, rtol=1e-12, atol=0)


def test_snapping_takes_the_nearest_level_in_the_logarithm() -> None:
    path = discrete_path((1 - betas("linear", 30)).cumprod(0))
    rho = torch.cat([torch.logspace(-4, 4, 301, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    index, level = path.nearest(rho)
    distance = (rho[:, None].clamp_min(1e-300).log() - path.levels.log()).abs()
    assert index.dtype == torch.int64
    assert torch.equal(index, distance.argmin(1))
    torch.testing.assert_close(level, path.levels[index], rtol=1e-12, atol=0)


def test_levels_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="remove a last noise level of pure noise"):
        discrete_path([0.9, 0.5, 0.0])
    with pytest.raises(UserError, match="decrease strictly"):
        discrete_path([0.5, 0.9])
    with pytest.raises(UserError, match="at least two"):
        discrete_path([0.5])
    with pytest.raises(UserError, match="did you mean scaled-linear"):
        betas("scaled_linear")
    with pytest.raises(UserError, match="number of noise levels"):
        betas("linear", 1)
    with pytest.raises(UserError, match=r"start=.*end=.* for 10 steps"):
        betas("linear", 10)  # rates scaled to 10 steps would exceed 1
    with pytest.raises(UserError, match="an offset k and a cap"):
        betas("cosine", 10, end=0.5)
