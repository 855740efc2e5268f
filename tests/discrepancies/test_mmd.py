"""MMD: closed forms, other packages' kernels, the algebra of its estimators, honest errors and levels."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise

from distmatch.base.errors import UserError
from distmatch.discrepancies import (
    chunks,
    gaussian,
    imq,
    laplace,
    median_bandwidth,
    mmd,
    mmd_loss,
    mmd_test,
    polynomial,
    rational_quadratic,
)
from distmatch.discrepancies.kernels import energy, resolve_kernel
from tests.reference.discrepancy_truths import covered, gaussian_mmd, samples

ALL = [gaussian(1.3), laplace(0.7), rational_quadratic(0.9), imq(1.1), energy(), energy(0.5), polynomial()]


def brute(kernel, x, y, estimator):
    """The textbook double loop, from the matrices."""
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    m, n = len(x), len(y)
    xx, yy = xx - xx.diagonal().diag(), yy - yy.diagonal().diag()
    if estimator == "biased":
        xx, yy = xx + kernel.paired(x, x).diag(), yy + kernel.paired(y, y).diag()
        return xx.mean() + yy.mean() - 2 * xy.mean()
    return xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.mean()


@pytest.mark.parametrize(
    ("kernel", "peer"),
    [
        (gaussian(1.3), lambda x, y: pairwise.rbf_kernel(x, y, gamma=1 / (2 * 1.3**2))),
        (laplace(0.7), lambda x, y: np.exp(-pairwise.euclidean_distances(x, y) / 0.7)),
        (imq(1.1), lambda x, y: (1 + pairwise.euclidean_distances(x, y, squared=True) / 1.1**2) ** -0.5),
        (energy(), lambda x, y: -pairwise.euclidean_distances(x, y)),
        (polynomial(), lambda x, y: pairwise.polynomial_kernel(x, y, degree=3)),
        (polynomial(2, 0.3, 0.5), lambda x, y: pairwise.polynomial_kernel(x, y, 2, 0.3, 0.5)),
        (
            rational_quadratic(0.9, [0.5, 2.0]),
            lambda x, y: np.mean(
                [
                    (1 + pairwise.euclidean_distances(x, y, squared=True) / (2 * a * 0.81)) ** -a
                    for a in (0.5, 2.0)
                ],
                axis=0,
            ),
        ),
    ],
)
def test_kernels_are_those_of_scikit_learn(kernel, peer):
    x, y = samples(40, 3, 0), samples(30, 3, 1, 0.5)
    np.testing.assert_allclose(kernel(x, y).numpy(), peer(x.numpy(), y.numpy()), rtol=1e-9)
    pairs = kernel.paired(x[:30], y)
    torch.testing.assert_close(pairs, kernel(x[:30], y).diagonal(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.name)
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("elements", [50, 10**6])
def test_chunks_give_the_textbook_sums(kernel, estimator, elements, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", elements)
    x, y = samples(37, 2, 0, 3.0), samples(23, 2, 1, 3.5)
    expected = float(brute(kernel, x, y, estimator))
    assert mmd(x, y, kernel, estimator=estimator).value == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert float(mmd_loss(x, y, kernel, estimator=estimator)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_unbiased_biased_and_their_difference():
    # V - U = (mean k(x,x) - mean k(x,x'))/m + the same for y, an identity.
    x, y, kernel = samples(50, 2, 0), samples(40, 2, 1), gaussian(1.0)
    u, v = (mmd(x, y, kernel, estimator=e).value for e in ("unbiased", "biased"))
    off = [(kernel(z, z).sum() - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    assert v - u == pytest.approx(float((1 - off[0]) / 50 + (1 - off[1]) / 40), rel=1e-9)
    assert mmd(x, x, kernel, estimator="biased").value == pytest.approx(0, abs=1e-15)


def test_linear_and_block_are_means_over_disjoint_parts():
    x, y, kernel = samples(45, 2, 0), samples(44, 2, 1, 0.3), gaussian(1.0)
    k = lambda a, b: float(kernel(a[None], b[None]))  # noqa: E731
    terms = [
        k(x[i], x[i + 1]) + k(y[i], y[i + 1]) - k(x[i], y[i + 1]) - k(x[i + 1], y[i]) for i in range(0, 44, 2)
    ]
    linear = mmd(x, y, kernel, estimator="linear")
    assert linear.value == pytest.approx(np.mean(terms), rel=1e-9)
    assert linear.stderr == pytest.approx(np.std(terms, ddof=1) / 22**0.5, rel=1e-9)
    blocks = [float(brute(kernel, x[i : i + 4], y[i : i + 4], "unbiased")) for i in range(0, 44, 4)]
    block = mmd(x[:44], y, kernel, estimator="block", block=4)
    assert block.value == pytest.approx(np.mean(blocks), rel=1e-9)
    assert "11 terms" in block.warning
    assert mmd(x, y, kernel, estimator="block").reliable


def test_half_of_the_biased_form_is_that_of_geomloss():
    geomloss = pytest.importorskip("geomloss")
    x, y = samples(60, 3, 0), samples(50, 3, 1, 0.4)
    peer = geomloss.SamplesLoss("gaussian", blur=0.8, backend="tensorized")(x, y)
    assert mmd(x, y, gaussian(0.8), estimator="biased").value == pytest.approx(2 * float(peer), rel=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize("estimator", ["unbiased", "linear", "block"])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_intervals_cover_the_closed_form(estimator, shift):
    # 200 repetitions (seeds 0..399), binomial sd 1.5 %. At equal laws the unbiased form claims nothing.
    truth = gaussian_mmd(torch.full((2,), shift), 1.0, 1.0, 1.0)
    runs = [
        mmd(samples(80, 2, 2 * i), samples(60, 2, 2 * i + 1, shift), gaussian(1.0), estimator=estimator)
        for i in range(200)
    ]
    claimed = [r for r in runs if r.reliable]
    if estimator == "unbiased" and shift == 0.0:
        assert len(claimed) <= 20
    else:
        assert len(claimed) >= 190
        assert 0.90 <= covered(claimed, truth) <= 0.99
    values = np.array([r.value for r in runs])
    assert values.mean() == pytest.approx(truth, abs=3.5 * values.std() / math.sqrt(200))  # unbiased


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.name)
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "linear", "block"])
def test_gradients(kernel, estimator, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 20)
    x, y = samples(9, 2, 0).requires_grad_(), samples(8, 2, 1, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mmd_loss(a, b, kernel, estimator=estimator), (x, y))


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.name)
def test_coinciding_points_have_finite_gradients(kernel):
    x = torch.zeros(6, 2, requires_grad=True)
    mmd_loss(x, torch.zeros(5, 2), kernel).backward()
    assert torch.isfinite(x.grad).all()


def test_a_step_down_the_gradient_brings_samples_closer():
    x, y = samples(100, 2, 0).requires_grad_(), samples(100, 2, 1, 1.0)
    before = mmd_loss(x, y)
    (g,) = torch.autograd.grad(before, x)
    assert (g.mean(0) < 0).all()  # towards the larger mean
    assert mmd_loss(x - 10 * g, y) < before


@pytest.mark.statistical
def test_the_level_of_the_permutation_test():
    # 200 nulls at 10 %: binomial sd 2.1 %, so 3 sd. Unequal sizes, bandwidth from the data.
    g = torch.Generator().manual_seed(0)
    p = [
        mmd_test(samples(30, 2, 2 * i), samples(20, 2, 2 * i + 1), permutations=99, generator=g).p_value
        for i in range(200)
    ]
    assert 0.037 <= np.mean([v <= 0.1 for v in p]) <= 0.163
    assert np.mean(p) == pytest.approx(0.5, abs=3 * 0.29 / math.sqrt(200))


@pytest.mark.parametrize("kernel", ["gaussian", "energy", "polynomial"])
def test_the_test_sees_a_difference_and_ties(kernel):
    g = torch.Generator().manual_seed(0)
    far = mmd_test(samples(60, 2, 0), samples(60, 2, 1, 1.5), kernel, permutations=199, generator=g)
    assert far.p_value == pytest.approx(1 / 200)
    ties = mmd_test(torch.ones(20, 2), torch.ones(15, 2), kernel, permutations=99, generator=g)
    assert ties.p_value == 1.0
    assert far.to_dict() == {"statistic": far.statistic, "p_value": 0.005, "resamples": 199, "n": 60}


def test_the_statistic_of_the_test_is_the_biased_form(monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 200)
    x, y = samples(30, 2, 0), samples(20, 2, 1, 0.5)
    found = mmd_test(x, y, gaussian(1.0), permutations=9).statistic
    assert found == pytest.approx(mmd(x, y, gaussian(1.0), estimator="biased").value, rel=1e-9)


def test_the_median_heuristic():
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0  # distances 1, 2, 3
    x = samples(300, 5, 0)
    assert median_bandwidth(x) == pytest.approx(float(torch.nn.functional.pdist(x).median()))
    assert median_bandwidth(torch.zeros(5, 2)) == 1.0
    mostly_equal = torch.cat([torch.zeros(9, 1), torch.full((1, 1), 4.0)])
    assert median_bandwidth(mostly_equal) == 4.0
    assert mmd(torch.ones(5, 2), torch.ones(7, 2)).value == 0.0
    assert median_bandwidth(samples(9000, 1, 0)) == pytest.approx(0.954, rel=0.05)  # sqrt(2) * 0.6745


def test_precision_follows_the_input():
    x, y = samples(400, 8, 0, 100.0), samples(300, 8, 1, 100.1)
    wide = mmd(x, y, "laplace")
    narrow = mmd(x.float(), y.float(), "laplace")
    assert narrow.value == pytest.approx(wide.value, abs=1e-6)  # the data are centered first
    assert mmd_loss(x, y).dtype == torch.float64
    assert mmd_loss(x.float(), y.float()).dtype == torch.float32
    assert mmd_loss(x.half(), y.half()).dtype == torch.float32


def test_refusals():
    x = samples(10, 2, 0)
    with pytest.raises(UserError, match="gaussian"):
        mmd(x, x, "gausian")
    with pytest.raises(UserError, match="linear"):
        mmd(x, x, estimator="lineal")
    with pytest.raises(UserError, match="linear"):
        mmd_loss(x, x, estimator="lineal")
    with pytest.raises(UserError, match="block size"):
        mmd(x, x, estimator="block", block=11)
    with pytest.raises(UserError, match="resamples"):
        mmd_test(x, x, permutations=0)
    for make in (gaussian, laplace, imq, rational_quadratic):
        with pytest.raises(UserError, match="bandwidth"):
            make(0.0)
    with pytest.raises(UserError, match="exponent"):
        energy(2.0)
    with pytest.raises(UserError, match="exponent"):
        imq(1.0, 0.5)
    with pytest.raises(UserError, match="offset"):
        polynomial(offset=-1.0)
    assert resolve_kernel("imq", x).name == "imq"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_accelerator_gives_the_same():
    x, y = samples(500, 4, 0), samples(400, 4, 1, 0.2)
    a, b = mmd(x, y), mmd(x.cuda(), y.cuda())
    assert (a.value, a.stderr) == pytest.approx((b.value, b.stderr), rel=1e-9)
