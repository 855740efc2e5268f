"""The fast forms of Frechet distance and Vendi score, from eigenvalues alone, and when they are not used."""

import numpy as np
import pytest
import torch

from distmatch.metrics import frechet_distance, vendi_score
from distmatch.metrics.moments import center_of, congruence, scatter


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n, d):
    """Samples with mean zero and covariance one, exactly."""
    x = normal(n, d)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def rotation(d):
    return torch.linalg.qr(normal(d, d, seed=1))[0]


@pytest.mark.parametrize(("precision", "rel"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_sums_of_outer_products_over_several_parts_of_the_rows(precision, rel, monkeypatch):
    monkeypatch.setattr("distmatch.metrics.moments._ROWS", 64)
    x = normal(150, 20) + 3
    np.testing.assert_allclose(center_of(x), x.numpy().mean(0), rtol=1e-13)
    got = scatter(x, lambda part: part.to(precision))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, np.einsum("ni,nj->ij", x, x), rtol=rel)


def test_a_congruence_in_several_blocks_equals_the_two_products(monkeypatch):
    monkeypatch.setattr("distmatch.metrics.moments._COLUMNS", 8)
    lower, middle = normal(30, 30).tril(), normal(30, 30, seed=1)
    middle = middle @ middle.T
    np.testing.assert_allclose(
        congruence(lower, middle), lower.numpy().T @ middle.numpy() @ lower.numpy(), rtol=1e-11
    )


RISING, HEAD = torch.linspace(1, 2, 24), torch.arange(24) < 12
# Standard deviations of both sets: equal but for a millionth; covariances without an inverse, of the second
# set and of both; the former with a difference so small that the roots of rounding would exceed it.
SPREADS = {
    "close": (RISING, RISING * (1 + 1e-6)),
    "second singular": (RISING, RISING * HEAD),
    "both singular": (RISING * HEAD, 1.5 * (torch.arange(24) < 16)),
    "close and singular": (torch.where(HEAD, RISING, 1e-3), RISING * HEAD),
    "well conditioned": (RISING, RISING.flip(0)),
}


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("case", SPREADS)
def test_frechet_keeps_its_digits_where_eigenvalues_lose_them(case, turned):
    x, turn = whitened(200, 24), rotation(24) if turned else torch.eye(24, dtype=torch.float64)
    s, t = (spread.double() for spread in SPREADS[case])
    expected = float((s - t).square().sum())
    got = frechet_distance((x * s) @ turn, (x * t) @ turn)
    # where the roots of eigenvalues of S are 1e-3, those of their rounding are 1e-8; from eigenvalues: 5e-3
    assert got == pytest.approx(expected, rel=1e-4 if case == "close and singular" else 1e-7)


def exact_vendi(x):
    unit = x / x.norm(dim=1, keepdim=True)
    lam = np.linalg.svd(unit.numpy(), compute_uv=False) ** 2 / len(x)
    lam = lam[lam > 1e-15]
    return float(np.exp(-(lam * np.log(lam)).sum()))


@pytest.fixture
def wide(monkeypatch):
    """Products in float32 at the few dimensions of a test."""
    monkeypatch.setattr("distmatch.metrics.vendi._WIDE", 8)


@pytest.mark.usefixtures("wide")
def test_vendi_by_products_in_float32_is_right_to_a_millionth():
    x = normal(500, 40) * torch.linspace(1, 0.02, 40) + 0.1
    got, expected = vendi_score(x.float()), exact_vendi(x.float().double())
    assert got == pytest.approx(expected, rel=1e-6)
    assert got != pytest.approx(expected, rel=1e-12)  # so it was not multiplied in float64


@pytest.mark.usefixtures("wide")
def test_vendi_is_repeated_in_float64_where_float32_is_not_enough():
    x = (normal(500, 2) @ normal(2, 40, seed=1)).float()  # 38 eigenvalues are rounding
    assert vendi_score(x) == pytest.approx(exact_vendi(x.double()), rel=1e-9)
