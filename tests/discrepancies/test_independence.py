"""Distance covariance and its joint forms: dcor, the normal closed form, exact laws on bits, and XOR."""

import itertools

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.discrepancies import (
    chunks,
    concatenated_distance_covariance,
    distance_covariance,
    distance_covariance_loss,
    distance_covariance_test,
    joint_distance_covariance,
    joint_distance_covariance_loss,
)
from distmatch.discrepancies import distance_products as products
from tests.reference.discrepancy_truths import covered, normal_distance_covariance


def normals(n, rho, seed):
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, n, generator=g, dtype=torch.float64)
    return x, rho * x + (1 - rho**2) ** 0.5 * e


def xor(n, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 2, (2, n), generator=g)
    return [v.double() for v in (a ^ b, a, b)]


def centered_matrix(x):
    """The unbiased centering, written out."""
    x = x.reshape(len(x), -1)
    a, n = torch.cdist(x, x), len(x)
    rows = a.sum(1) / (n - 2)
    u = rows[:, None] + rows - a - a.sum() / ((n - 1) * (n - 2))
    return u.fill_diagonal_(0)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "e"), [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("elements", [100, 10**6])
def test_both_forms_are_those_of_dcor(d, e, elements, monkeypatch):
    dcor = pytest.importorskip("dcor")
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", elements)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(75, d, generator=g, dtype=torch.float64) + 5
    y = x[:, :1] ** 2 + torch.randn(75, e, generator=g, dtype=torch.float64)
    for estimator, peer in (
        ("unbiased", dcor.u_distance_covariance_sqr),
        ("biased", dcor.distance_covariance_sqr),
    ):
        expected = float(peer(x.numpy(), y.numpy()))
        assert distance_covariance(x, y, estimator=estimator).value == pytest.approx(expected, rel=1e-6)
        assert float(distance_covariance_loss(x, y, estimator=estimator)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [4, 5, 32, 33, 64, 300, 1500])
@pytest.mark.parametrize("decimals", [12, 0])
@pytest.mark.parametrize("children", [256, 3])
def test_the_table_gives_what_the_matrices_give(n, decimals, children, monkeypatch):
    # At most 3 children to a block make the 47 blocks of n = 1500 four levels deep.
    monkeypatch.setattr(products, "_CHILDREN", children)
    x, y = (v.round(decimals=decimals) for v in normals(n, 0.5, n))
    sums = products.product_sums(x[:, None], y[:, None])
    a, b = (x[:, None] - x).abs(), (y[:, None] - y).abs()
    for found, expected in ((sums.a, a.sum(1)), (sums.b, b.sum(1)), (sums.ab, (a * b).sum(1))):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_error_bar_is_the_jackknife():
    x, y = normals(60, 0.7, 0)
    left_out = [distance_covariance(x[keep], y[keep]).value for keep in ~torch.eye(60, dtype=torch.bool)]
    jackknife = 59 / 60**0.5 * np.std(left_out)
    assert distance_covariance(x, y).stderr == pytest.approx(jackknife, rel=0.01)


@pytest.mark.parametrize("d", [1, 2])
def test_the_terms_behind_the_error_bar_are_the_row_sums(d):
    # Padded with a zero column the same samples take the general path.
    x, y = (torch.stack([v, 0 * v], 1)[:, :d] for v in normals(60, 0.7, 0))
    product = centered_matrix(x) * centered_matrix(y)
    expected = float(2 * (product.sum(1) / 57).std() / 60**0.5) * 59 / 57
    assert distance_covariance(x, y).stderr == pytest.approx(expected, rel=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_intervals_cover_the_normal_closed_form(rho):
    # 200 repetitions (seeds 0..199): binomial sd 1.5 %.
    runs = [distance_covariance(*normals(100, rho, i)) for i in range(200)]
    truth = normal_distance_covariance(rho)
    assert 0.90 <= covered([r for r in runs if r.reliable], truth) <= 0.99
    values = np.array([r.value for r in runs])
    assert values.mean() == pytest.approx(truth, abs=3.5 * values.std() / 200**0.5)  # unbiased


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("d", [1, 2])
def test_gradients(d, estimator, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 20)
    monkeypatch.setattr(products, "_LEAST_ROW", 2)
    monkeypatch.setattr(products, "_CHILDREN", 2)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, d, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: distance_covariance_loss(a, b, estimator=estimator), (x, y))


def test_joint_gradients(monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 20)
    g = torch.Generator().manual_seed(0)
    v = [torch.randn(8, d, generator=g, dtype=torch.float64, requires_grad=True) for d in (1, 2, 1)]
    assert torch.autograd.gradcheck(lambda *a: joint_distance_covariance_loss(a, c=0.5), v)


@pytest.mark.parametrize("elements", [100, 10**6])
def test_the_joint_form_is_its_decomposition(elements, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", elements)
    x, y = normals(50, 0.6, 0)
    z = x * y
    u, v, w = (centered_matrix(t) for t in (x, y, z))
    scale = 50 * 47
    pairs = [distance_covariance(*p).value for p in itertools.combinations((x, y, z), 2)]
    triple = float((u * v * w).sum()) / scale
    for c in (1.0, 0.5):
        joint = joint_distance_covariance([x, y, z], c=c).value
        assert joint == pytest.approx(c * sum(pairs) + triple, rel=1e-8)
        about = joint_distance_covariance([x, y, z], c=c, about_first=True).value
        assert about == pytest.approx(c * (pairs[0] + pairs[1]) + triple, rel=1e-8)
    assert joint_distance_covariance([x, y]).value == pytest.approx(pairs[0], rel=1e-8)


def test_the_gradient_is_the_same_without_the_part_that_does_not_hold_the_first():
    x, y = normals(30, 0.6, 0)
    x.requires_grad_()
    whole, about = (
        torch.autograd.grad(joint_distance_covariance_loss([x, y, y**2], about_first=a), x)[0]
        for a in (False, True)
    )
    torch.testing.assert_close(whole, about)


@pytest.mark.statistical
def test_only_the_joint_forms_see_xor():
    # For fair bits U is +-1/2, so the triple term is (1/2)^3 and CCdCov an exact number too.
    f, a, b = xor(400, 0)
    pairwise = distance_covariance(f, a)
    assert abs(pairwise.value) < 0.003
    joint = joint_distance_covariance([f, a, b])
    assert joint.value == pytest.approx(0.125, abs=0.01)
    other = concatenated_distance_covariance(f, [a, b])
    assert other.value == pytest.approx(exact_xor_concatenated(), abs=0.01)
    assert other.value > 10 * other.stderr > 0


def exact_xor_concatenated():
    points = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))
    a = torch.cdist(points, points)
    f = (points[:, 0] != points[:, 1]).double()
    b = (f[:, None] - f).abs()

    def center(m):
        return m - m.mean(0) - m.mean(1)[:, None] + m.mean()

    return float((center(a) * center(b)).mean())


@pytest.mark.statistical
@pytest.mark.parametrize("about_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_joint_intervals_cover(about_first):
    # The truth from 20 samples of 600: an error a tenth of that of n = 120. 200 repetitions: sd 1.5 %.
    strength = 0.7

    def draw(n, seed):
        x, y = normals(n, strength, seed)
        return [x, y, strength * x * y + normals(n, 0.0, seed + 5000)[0]]

    large = [
        joint_distance_covariance_loss(draw(600, 10_000 + i), about_first=about_first) for i in range(20)
    ]
    truth = float(torch.stack(large).mean())
    runs = [joint_distance_covariance(draw(120, i), about_first=about_first) for i in range(200)]
    assert all(r.reliable for r in runs)
    assert 0.90 <= covered(runs, truth) <= 0.99


@pytest.mark.statistical
def test_the_level_and_power_of_the_independence_test():
    # 100 nulls at 10 %, sd 3 %; the relation y = x^2 has correlation zero.
    g = torch.Generator().manual_seed(0)
    p = [
        distance_covariance_test(*normals(25, 0.0, i), permutations=39, generator=g).p_value
        for i in range(100)
    ]
    assert 0.01 <= np.mean([v <= 0.1 for v in p]) <= 0.19
    x, _ = normals(60, 0.0, 0)
    assert distance_covariance_test(x, x**2, permutations=99, generator=g).p_value == pytest.approx(0.01)
    wide = torch.stack([x, x], 1)
    assert distance_covariance_test(wide, x**2, permutations=99, generator=g).p_value == pytest.approx(0.01)


def test_constants_and_refusals():
    x, y = normals(20, 0.5, 0)
    for constant in (torch.ones(20), torch.ones(20, 2)):
        result = distance_covariance(x, constant)
        assert (result.value, result.stderr) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-6))
    assert distance_covariance_test(x, torch.ones(20), permutations=19).p_value == 1.0
    with pytest.raises(UserError, match="paired"):
        distance_covariance(x, y[:10])
    with pytest.raises(UserError, match="too few samples"):
        distance_covariance(x[:3], y[:3])
    with pytest.raises(UserError, match="number of variables"):
        joint_distance_covariance([x])
    with pytest.raises(UserError, match="c must be positive"):
        joint_distance_covariance([x, y], c=0)
    with pytest.raises(UserError, match="unbiased"):
        distance_covariance(x, y, estimator="u")
    with pytest.raises(UserError, match="paired"):
        joint_distance_covariance([x, y[:10]])
