"""Sinkhorn divergence against other packages, closed forms, exact transport and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment

from distmatch.discrepancies import sinkhorn_solver
from distmatch.discrepancies.gaussian_transport import gaussian_sinkhorn
from distmatch.discrepancies.sinkhorn import sinkhorn_divergence
from distmatch.discrepancies.sinkhorn_estimate import sinkhorn_estimate
from tests.helpers.draws import normal
from tests.reference.transport_samples import seeded, weighted_pair


@pytest.fixture
def pair():
    return weighted_pair()


@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")
@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_sinkhorn_agrees_with_pot(pair, epsilon):
    """POT's cost has no half: OT_eps of |x - y|^2 / 2 is half its value at 2 eps, with KL against a x b."""
    ot = pytest.importorskip("ot")

    def theirs(x, y, a, b):
        x, y, a, b = (t.numpy() for t in (x, y, a, b))
        return (
            ot.solve_sample(x, y, a=a, b=b, reg=2 * epsilon, reg_type="KL", tol=1e-12, max_iter=2000).value
            / 2
        )

    x, y, a, b = pair
    settings = {"a": a, "b": b, "epsilon": epsilon, "tol": 1e-7}
    both = theirs(x, y, a, b)
    assert float(sinkhorn_divergence(x, y, debias=False, **settings).value) == pytest.approx(both, rel=1e-8)
    expected = both - theirs(x, x, a, a) / 2 - theirs(y, y, b, b) / 2
    assert float(sinkhorn_divergence(x, y, **settings).value) == pytest.approx(expected, rel=1e-8)


def test_sinkhorn_agrees_with_geomloss(pair):
    """Value and gradients; geomloss is only as converged as its cooling is slow, here to about 2e-7."""
    geomloss = pytest.importorskip("geomloss")
    x, y, a, b = pair
    mine, theirs = ([t.clone().requires_grad_() for t in (x, y)] for _ in range(2))
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=1.0, scaling=0.9995, backend="tensorized")
    expected = loss(a, theirs[0], b, theirs[1])
    expected.backward()
    value = sinkhorn_divergence(*mine, a=a, b=b, epsilon=1.0, tol=1e-8).value
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m.grad, t.grad, rtol=1e-3, atol=1e-5)


def test_small_epsilon_brackets_the_assignment():
    """W <= OT_eps <= W + eps log n for uniform weights, as the best assignment is a feasible plan."""
    x, y = normal(15, 2), normal(15, 2, seed=1) + 1
    cost = torch.cdist(x, y).square() / 2
    exact = float(cost[linear_sum_assignment(cost.numpy())].sum()) / 15
    epsilon = 2e-3
    result = sinkhorn_divergence(x, y, epsilon=epsilon, debias=False, tol=1e-6, max_iter=5000)
    assert result.converged
    assert exact < float(result.value) <= exact + epsilon * math.log(15)


def test_small_epsilon_meets_exact_transport_with_weights(pair):
    ot = pytest.importorskip("ot")
    x, y, a, b = pair
    exact = ot.emd2(a.numpy(), b.numpy(), ot.dist(x.numpy(), y.numpy()) / 2)
    near = [float(sinkhorn_divergence(x, y, a=a, b=b, epsilon=e).value) for e in (0.1, 0.02, 0.005)]
    gaps = [abs(v - exact) for v in near]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.005 * exact


def test_large_epsilon_is_half_the_squared_distance_of_the_means(pair):
    x, y, a, b = pair
    apart = float((a @ x - b @ y).square().sum()) / 2
    value = float(sinkhorn_divergence(x, y, a=a, b=b, epsilon=1e5, tol=1e-12).value)
    assert value == pytest.approx(apart, rel=1e-4)


def test_sinkhorn_is_zero_on_equal_measures_and_symmetric(pair):
    x, y, a, b = pair
    mixed = torch.randperm(len(x), generator=seeded(0))
    assert float(sinkhorn_divergence(x, x[mixed], a=a, b=a[mixed], tol=1e-8).value) == pytest.approx(
        0, abs=1e-10
    )
    there = sinkhorn_divergence(x, y, a=a, b=b, tol=1e-8)
    back = sinkhorn_divergence(y, x, a=b, b=a, tol=1e-8)
    assert float(there.value) > 0
    assert float(there.value) == pytest.approx(float(back.value), rel=1e-10)
    assert there.epsilon == pytest.approx(back.epsilon)
    torch.testing.assert_close(there.f, back.g, rtol=1e-5, atol=1e-6)


def test_a_shift_costs_half_its_square(pair):
    x, y, a, b = pair
    shift = torch.tensor([0.7, -1.2, 0.3], dtype=torch.float64)
    value = float(sinkhorn_divergence(x, x + shift, a=a, b=a, epsilon=0.5, tol=1e-8).value)
    assert value == pytest.approx(float(shift.square().sum()) / 2, rel=1e-8)
    here, there = (
        sinkhorn_divergence(x + c, y + c, a=a, b=b, epsilon=0.5, tol=1e-8).value for c in (0.0, 1000.0)
    )
    assert float(there) == pytest.approx(float(here), rel=1e-8)


def test_only_the_measure_matters(pair):
    """Order, a point split in two, and points of no weight change nothing."""
    x, y, a, b = pair
    settings = {"epsilon": 0.3, "tol": 1e-8}
    value = float(sinkhorn_divergence(x, y, a=a, b=b, **settings).value)
    order = torch.randperm(len(x), generator=seeded(1))
    assert float(sinkhorn_divergence(x[order], y, a=a[order], b=b, **settings).value) == pytest.approx(value)
    split_x, split_a = torch.cat([x, x[:1]]), torch.cat([a[:1] / 2, a[1:], a[:1] / 2])
    assert float(sinkhorn_divergence(split_x, y, a=split_a, b=b, **settings).value) == pytest.approx(value)
    nowhere = torch.cat([b, b.new_zeros(1)])
    result = sinkhorn_divergence(x, torch.cat([y, y[:1] + 5]), a=a, b=nowhere, **settings)
    assert float(result.value) == pytest.approx(value, rel=1e-9)
    assert torch.isfinite(result.g).all()


def test_sinkhorn_gradients_agree_with_finite_differences(pair):
    """Along a random direction in all inputs at once; weights move so that their sum stays one."""
    inputs = [t.clone().requires_grad_() for t in pair]
    steps = [normal(*t.shape, seed=7 + i) for i, t in enumerate(pair)]
    steps[2:] = [w * (s - w @ s) for w, s in zip(pair[2:], steps[2:], strict=True)]

    def value(inputs):
        x, y, a, b = inputs
        return sinkhorn_divergence(x, y, a=a, b=b, epsilon=0.4, tol=1e-9).value

    value(inputs).backward()
    h = 1e-4
    ahead, behind = (value([t + s * d for t, d in zip(pair, steps, strict=True)]) for s in (h, -h))
    for i in range(4):
        assert inputs[i].grad.abs().max() > 0
    slope = sum(float((t.grad * d).sum()) for t, d in zip(inputs, steps, strict=True))
    assert slope == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-6)


def test_the_gradient_has_no_second_derivative_by_mistake(pair):
    x = pair[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(sinkhorn_divergence(x, pair[1]).value.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("block", [1, 2000])
def test_blocks_and_a_kept_kernel_give_the_same(pair, monkeypatch, block):
    x, y, a, b = pair
    settings = {"a": a, "b": b, "epsilon": 0.05, "tol": 1e-8}
    kept = x.clone().requires_grad_()
    first = sinkhorn_divergence(kept, y, **settings).value
    first.backward()
    monkeypatch.setattr(sinkhorn_solver, "_BLOCK_BYTES", {"cpu": block})
    streamed = x.clone().requires_grad_()
    second = sinkhorn_divergence(streamed, y, memory=0, **settings).value
    second.backward()
    assert first.item() == pytest.approx(second.item(), rel=1e-9)
    torch.testing.assert_close(kept.grad, streamed.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_float32_keeps_its_precision_and_survives_an_outlier(memory):
    """A point so far out that its kernel column vanishes in float32 (exponent -5e6) is still transported."""
    x, y = normal(200, 2), normal(200, 2, seed=1)
    y[0] = torch.tensor([1000.0, 0.0])
    wide = sinkhorn_divergence(x, y, epsilon=0.1, memory=memory)
    narrow = sinkhorn_divergence(x.float(), y.float(), epsilon=0.1, memory=memory, tol=1e-4)
    assert narrow.value.dtype == torch.float32
    assert wide.converged
    assert narrow.converged
    assert float(narrow.value) == pytest.approx(float(wide.value), rel=1e-5)
    assert float(wide.value) == pytest.approx(1000**2 / 2 / 200, rel=0.05)


def test_a_step_is_exact_where_a_column_underflows():
    """One point 2000 eps away from all others: its mass is exp(-2000), but its potential is computed."""
    x, y = normal(6, 2), normal(8, 2, seed=1)
    y[3] = torch.tensor([20.0, 0.0])
    left, right = (sinkhorn_solver.cloud(z, torch.full((len(z),), 1 / len(z), dtype=z.dtype)) for z in (x, y))
    g = torch.zeros(8, dtype=torch.float64)
    found = sinkhorn_solver.sweep_blocks(left, right, g, 0.1)
    step = sinkhorn_solver._ascent(left, right, g, found, 0.1)
    cost = torch.cdist(x, y).square() / 2
    exact = -0.1 * torch.logsumexp((found.f[:, None] - cost) / 0.1 - math.log(6), 0)
    torch.testing.assert_close(g + step, exact)


def test_sinkhorn_says_when_it_has_not_converged(pair):
    x, y, a, b = pair
    early = sinkhorn_divergence(x, y, a=a, b=b, epsilon=1e-3, max_iter=3)
    assert not early.converged
    assert early.iterations == 3
    assert early.marginal_error > 1e-3
    done = sinkhorn_divergence(x, y, a=a, b=b)
    assert done.converged
    assert done.marginal_error <= 2e-5


def covariance(d, seed):
    root = normal(d, d, seed=seed)
    return root @ root.T / d


@pytest.mark.parametrize("d", [1, 2, 10])
def test_gaussian_sinkhorn_runs_from_wasserstein_to_the_means(d):
    """Both limits: the Bures formula by SciPy's matrix root for small eps, the means for large eps."""
    mean, first, second = normal(d, seed=9), covariance(d, 1), covariance(d, 2)
    root = sqrtm(first.numpy())
    bures = np.trace(first.numpy() + second.numpy() - 2 * sqrtm(root @ second.numpy() @ root).real)
    apart = float(mean @ mean)
    zero = torch.zeros(d)
    small, large = (float(gaussian_sinkhorn(zero, first, mean, second, e)) for e in (1e-7, 1e7))
    assert small == pytest.approx((apart + bures) / 2, rel=1e-4)
    assert large == pytest.approx(apart / 2, rel=1e-4)
    assert float(gaussian_sinkhorn(mean, first, mean, first, 0.3)) == pytest.approx(0, abs=1e-12)


def test_gaussian_sinkhorn_on_the_line_is_that_of_many_quantiles():
    """600 midpoint quantiles hold a Gaussian to a few 1e-3; this fixes the formula between its limits."""
    quantiles = torch.special.ndtri((torch.arange(600, dtype=torch.float64) + 0.5) / 600)
    one, half, two = torch.zeros(1), torch.ones(1) / 2, torch.ones(1, 1)
    exact = float(gaussian_sinkhorn(one, two, half, 4 * two, 1.0))
    value = sinkhorn_divergence(quantiles, 2 * quantiles + 0.5, epsilon=1.0, tol=1e-6).value
    assert float(value) == pytest.approx(exact, rel=5e-3)


def estimates(d, n, share, repetitions):
    """Truth and estimates between two Gaussians that differ in mean and width."""
    shift, epsilon = torch.full((d,), 1 / math.sqrt(d)), share * d * 1.2
    truth = float(gaussian_sinkhorn(torch.zeros(d), torch.eye(d), shift, 0.49 * torch.eye(d), epsilon))
    pairs = (
        (normal(n, d, seed=2 * s), normal(n, d, seed=2 * s + 1) * 0.7 + shift) for s in range(repetitions)
    )
    return truth, [sinkhorn_estimate(x, y, epsilon=epsilon, tol=1e-2) for x, y in pairs]


@pytest.mark.statistical
@pytest.mark.parametrize(("d", "share"), [pytest.param(2, 0.2, marks=pytest.mark.slow), (4, 0.5)])
def test_sinkhorn_bars_cover_the_closed_form(d, share):
    """60 repetitions; 51 or fewer hits have a probability below 1% at a true coverage of 93%.

    In four dimensions the bias that is taken off is about a third of the bar.
    """
    truth, found = estimates(d, n=120, share=share, repetitions=60)
    assert all(e.n == 120 for e in found)
    assert sum(e.reliable for e in found) >= 45
    hits = sum(abs(e.value - truth) <= 1.96 * e.stderr for e in found)
    assert 52 <= hits <= 60
    spread = np.std([e.value for e in found])
    assert np.mean([e.stderr for e in found]) == pytest.approx(spread, rel=0.25)


@pytest.mark.statistical
def test_sinkhorn_says_where_its_bias_cannot_be_taken_off():
    """Small epsilon in ten dimensions: the value is off by ten bars, and every result says so."""
    truth, found = estimates(10, n=150, share=0.05, repetitions=5)
    assert all(e.value > truth + 3 * e.stderr for e in found)
    assert all("the bias" in e.warning for e in found)


def test_sinkhorn_near_the_null_or_unfinished_claims_no_bar():
    x, y = normal(80, 2), normal(80, 2, seed=1)
    assert "standard errors of zero" in sinkhorn_estimate(x, y, epsilon=1.0).warning
    assert "3 iterations" in sinkhorn_estimate(x, y + 3, epsilon=1e-3, max_iter=3).warning


def test_tiny_and_constant_samples():
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    result = sinkhorn_divergence(one, other)
    assert float(result.value) == pytest.approx(12.5)
    assert math.isnan(result.stderr)
    constant = sinkhorn_divergence(torch.ones(5, 2), torch.ones(7, 2))
    assert float(constant.value) == pytest.approx(0, abs=1e-6)
    assert constant.converged
