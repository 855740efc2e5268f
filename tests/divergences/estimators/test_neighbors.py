"""The k-NN estimate of KL: the formula by brute force, ties, and what cannot work."""

import math

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.divergences.estimators import kl_neighbors, neighbors


def draw(n: int, d: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(x: np.ndarray, y: np.ndarray, k: int) -> float:
    rho = np.sort(np.linalg.norm(x[:, None] - x[None], axis=-1), axis=1)[:, k]  # column 0 is the point itself
    nu = np.sort(np.linalg.norm(x[:, None] - y[None], axis=-1), axis=1)[:, k - 1]
    return x.shape[1] * np.log(nu / rho).mean() + math.log(len(y) / (len(x) - 1))


@pytest.mark.parametrize(("d", "k"), [(1, 1), (2, 5), (9, 3)])
def test_the_value_is_the_published_formula(d, k):
    x_p, x_q = draw(150, d) + 0.3, draw(210, d, seed=1)
    assert kl_neighbors(x_p, x_q, k=k).value == pytest.approx(
        brute_force(x_p.numpy(), x_q.numpy(), k), rel=1e-12
    )


def test_tree_and_distance_matrix_agree(monkeypatch):
    x_p, x_q = draw(600, 2), draw(700, 2, seed=1)
    tree = kl_neighbors(x_p, x_q)
    monkeypatch.setattr("distmatch.base.neighbors._TREE_DIMENSIONS", 0)
    monkeypatch.setattr("distmatch.base.neighbors._PAIRS", 999)  # a few rows at a time
    matrix = kl_neighbors(x_p, x_q)
    assert matrix.value == pytest.approx(tree.value, rel=1e-12)
    assert matrix.stderr == pytest.approx(tree.stderr, rel=1e-9)
    assert tree.reliable


def test_the_error_is_the_spread_of_refits_to_halves():
    """Leaving halves out of the neighbor lists equals estimating anew without them."""
    n, m, k = 200, 260, 3
    x_p, x_q = draw(n, 2) * 1.2, draw(m, 2, seed=1)
    found = kl_neighbors(x_p, x_q, k=k, seed=7)
    stream = neighbors.seeds.generator(7, "neighbours/halves")
    values = []
    for _ in range(neighbors._HALVES):
        kept_p = torch.randperm(n, generator=stream) >= n // 2
        kept_q = torch.randperm(m, generator=stream) >= m // 2
        first, second = x_p[kept_p].numpy(), x_q[kept_q].numpy()
        values.append([brute_force(first, second, rank) for rank in (k, 3 * k)])
    values = np.array(values)
    spread, drift_error = values[:, 0].std(ddof=1), (values[:, 1] - values[:, 0]).std(ddof=1)
    full = [brute_force(x_p.numpy(), x_q.numpy(), rank) for rank in (k, 3 * k)]
    growth = math.sqrt(3) - 1  # 3^(1/d) - 1 in the plane
    expected = math.hypot(spread, (full[1] - full[0]) / growth, drift_error / growth)
    assert found.stderr == pytest.approx(expected, rel=1e-9)


def test_the_kth_of_those_left_is_counted_without_those_gone():
    distances = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(4, 1)
    gone = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    # The last has too few left: the largest that is known stands for it.
    assert neighbors._kth_of_others(distances, gone, 2).tolist() == [2.0, 4.0, 2.0, 4.0]


@pytest.mark.statistical
def test_two_normals_on_a_line():
    found = kl_neighbors(draw(2000, seed=2) + 1.0, draw(2000, seed=3))
    assert found.reliable
    assert abs(found.value - 0.5) < 3 * found.stderr
    assert found.stderr < 0.08


@pytest.mark.parametrize(("d", "word"), [(10, "too few"), (50, "too few")])
def test_many_dimensions_are_no_confident_number(d, word):
    found = kl_neighbors(draw(500, d) + 1 / math.sqrt(d), draw(500, d, seed=1))
    assert not found.reliable
    assert math.isnan(found.stderr)
    assert word in found.warning


def test_supports_that_do_not_overlap_are_reported():
    found = kl_neighbors(draw(300) + 100.0, draw(300, seed=1))
    assert "may be infinite" in found.warning
    assert math.isnan(found.stderr)


def test_a_few_copies_do_no_harm_and_many_are_reported():
    x_p, x_q = draw(2000) + 1.0, draw(2000, seed=1)
    clean = kl_neighbors(x_p, x_q, k=1)
    few = x_p.clone()
    few[:5] = few[5:10]
    few[20] = x_q[3]
    found = kl_neighbors(few, x_q, k=1)
    assert abs(found.value - clean.value) < 0.05
    rounded = kl_neighbors((5 * x_p).round() / 5, (5 * x_q).round() / 5)
    assert "coincide" in rounded.warning
    assert math.isfinite(rounded.value)
    two_points = torch.tensor([0.0, 1.0]).repeat(50)
    assert math.isfinite(kl_neighbors(two_points, two_points).value)


@pytest.mark.parametrize(
    ("x_p", "x_q", "kw", "word"),
    [
        (draw(16), draw(100), {}, "too few"),
        (draw(100), draw(100, 2), {}, "different shapes"),
        (draw(100), torch.full((100, 1), math.inf, dtype=torch.float64), {}, "not finite"),
        (draw(100), torch.ones(100, 1), {}, "all equal"),
        (draw(100), torch.ones(100, 1, dtype=torch.int32), {}, "floating-point"),
        (draw(100), draw(100), {"k": 0}, "positive whole number"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(x_p, x_q, kw, word):
    with pytest.raises(UserError, match=word):
        kl_neighbors(x_p, x_q, **kw)
