"""Sinkhorn divergence and sliced Wasserstein: other packages, closed forms, finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from distmatch.base.errors import UserError
from distmatch.discrepancies import line, sinkhorn_solver, sliced
from distmatch.discrepancies.line import wasserstein_1d
from distmatch.discrepancies.sinkhorn import sinkhorn_divergence
from distmatch.discrepancies.sliced import (
    max_sliced_wasserstein,
    random_directions,
    sliced_wasserstein,
    sliced_wasserstein_loss,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(n, seed=0):
    raw = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return raw / raw.sum()


@pytest.fixture
def pair():
    """Unequal sizes, weights on both sides, three dimensions."""
    return normal(30, 3), 0.6 * normal(42, 3, seed=1) + 1, weights(30, 2), weights(42, 3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Sinkhorn: independent packages


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


# Sinkhorn: what must hold exactly


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
    assert float(first) == pytest.approx(float(second), rel=1e-9)
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


def test_sinkhorn_says_when_it_has_not_converged(pair):
    x, y, a, b = pair
    early = sinkhorn_divergence(x, y, a=a, b=b, epsilon=1e-3, max_iter=3)
    assert not early.converged
    assert early.iterations == 3
    assert early.marginal_error > 1e-3
    assert "3 iterations" in early.estimate.warning
    assert not early.estimate.reliable
    done = sinkhorn_divergence(x, y, a=a, b=b)
    assert done.converged
    assert done.marginal_error <= 2e-5
    assert done.estimate.reliable
    assert done.estimate.n == 30


def gaussian_sinkhorn(mean, first, second, eps):
    """S_eps between two Gaussians (Janati et al. 2020), from OT_2eps for the cost |x - y|^2."""

    def transport(apart, a, b):
        d = len(a)
        root = sqrtm(a).real
        mixed = sqrtm(4 * root @ b @ root + eps**2 * np.eye(d)).real
        log_det = np.linalg.slogdet(mixed + eps * np.eye(d))[1]
        spread = np.trace(a) + np.trace(b) - np.trace(mixed) + eps * (d * (1 - math.log(2 * eps)) + log_det)
        return (apart @ apart + spread) / 2

    zero = np.zeros(len(mean))
    return (
        transport(mean, first, second)
        - transport(zero, first, first) / 2
        - transport(zero, second, second) / 2
    )


def sinkhorn_hits(n, repetitions, epsilon):
    """How often the nominal 95% interval covers the closed form, for two Gaussians in the plane."""
    mean, scale = np.array([1.0, 0.5]), np.array([0.7, 1.2])
    truth = gaussian_sinkhorn(mean, np.eye(2), np.diag(scale**2), epsilon)
    hits = 0
    for seed in range(repetitions):
        x = normal(n, 2, seed=2 * seed)
        y = normal(n, 2, seed=2 * seed + 1) * torch.tensor(scale) + torch.tensor(mean)
        estimate = sinkhorn_divergence(x, y, epsilon=epsilon, tol=1e-3).estimate
        hits += abs(estimate.value - truth) <= 1.96 * estimate.stderr
    return hits


def test_sinkhorn_bars_cover_the_closed_form():
    """60 repetitions; 51 or fewer hits have a probability below 1% at a true coverage of 93%."""
    assert 52 <= sinkhorn_hits(n=150, repetitions=60, epsilon=1.0) <= 60


def test_sinkhorn_near_the_null_claims_no_reliable_bar():
    assert (
        "standard errors of zero"
        in sinkhorn_divergence(normal(80, 2), normal(80, 2, seed=1)).estimate.warning
    )


def test_tiny_and_constant_samples():
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    result = sinkhorn_divergence(one, other)
    assert float(result.value) == pytest.approx(12.5)
    assert math.isnan(result.stderr)
    constant = sinkhorn_divergence(torch.ones(5, 2), torch.ones(7, 2))
    assert float(constant.value) == pytest.approx(0, abs=1e-6)
    assert constant.converged


# The line


@pytest.mark.parametrize("weighted", [False, True])
def test_wasserstein_1d_agrees_with_scipy_and_pot(weighted):
    x, y = normal(37), 1.5 * normal(52, seed=1) + 0.3
    a, b = (weights(37, 2), weights(52, 3)) if weighted else (None, None)
    expected = wasserstein_distance(x, y, a, b)
    assert float(wasserstein_1d(x, y, p=1, a=a, b=b)) == pytest.approx(expected, rel=1e-12)
    ot = pytest.importorskip("ot")
    for p in (1, 2, 3.5):
        theirs = ot.wasserstein_1d(*(None if t is None else t.numpy() for t in (x, y, a, b)), p=p) ** (1 / p)
        assert float(wasserstein_1d(x, y, p=p, a=a, b=b)) == pytest.approx(float(theirs), rel=1e-10)


def test_wasserstein_1d_is_the_best_assignment():
    x, y = normal(20), normal(20, seed=1)
    cost = (x[:, None] - y).abs() ** 3
    best = float(cost[linear_sum_assignment(cost.numpy())].mean())
    assert float(wasserstein_1d(x, y, p=3)) ** 3 == pytest.approx(best, rel=1e-12)


def test_wasserstein_1d_of_gaussian_quantiles_is_the_closed_form():
    """W2^2 = (difference of means)^2 + (difference of sigmas)^2; midpoints cut the tails by 1e-3."""
    levels = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    quantiles = torch.special.ndtri(levels)
    value = float(wasserstein_1d(quantiles, 2 * quantiles[::2] + 1))
    assert value == pytest.approx(math.sqrt(2), rel=2e-3)


def test_wasserstein_1d_of_equal_samples_is_zero_with_a_zero_gradient():
    x = normal(9).requires_grad_()
    value = wasserstein_1d(x, x.detach().flip(0))
    value.backward()
    assert float(value) == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


# Sliced


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_sliced_agrees_with_pot(pair, p, weighted):
    ot = pytest.importorskip("ot")
    x, y, a, b = pair if weighted else (*pair[:2], None, None)
    directions = random_directions(3, 40, generator=seeded(0))
    theirs = ot.sliced_wasserstein_distance(
        *(None if t is None else t.numpy() for t in (x, y, a, b)), projections=directions.T.numpy(), p=p
    )
    mine = sliced_wasserstein(x, y, p=p, a=a, b=b, directions=directions)
    assert mine.value == pytest.approx(float(theirs), rel=1e-10)


def test_equal_and_unequal_sizes_and_weights_tell_one_story():
    """Three code paths on one measure: every point of x twice is x, and equal weights are no weights."""
    x, y = normal(20, 3), normal(20, 3, seed=1)
    directions = random_directions(3, 10, generator=seeded(0))
    value = sliced_wasserstein(x, y, directions=directions).value
    assert sliced_wasserstein(x.repeat(2, 1), y, directions=directions).value == pytest.approx(value)
    even = torch.full((20,), 0.05, dtype=torch.float64)
    assert sliced_wasserstein(x, y, a=even, directions=directions).value == pytest.approx(value)
    order = torch.randperm(20, generator=seeded(3))
    a = weights(20)
    first, second = (
        sliced_wasserstein(z, y, a=w, directions=directions) for z, w in ((x, a), (x[order], a[order]))
    )
    assert first.value == pytest.approx(second.value)
    assert sliced_wasserstein(y, x, b=a, directions=directions).value == pytest.approx(first.value)


@pytest.mark.parametrize("d", [2, 10])
def test_a_shift_costs_its_square_over_d(d):
    """W_2 along t of x and x + c is |t.c| exactly, whose square has mean |c|^2 / d over directions."""
    x, shift = normal(50, d), normal(d, seed=5)
    estimate = sliced_wasserstein(x, x + shift, projections=2000, generator=seeded(0))
    assert abs(estimate.value - float(shift.norm()) / math.sqrt(d)) < 3 * estimate.stderr
    assert sliced_wasserstein(x, x).value == 0


def angles(count):
    turn = torch.arange(count, dtype=torch.float64) * math.pi / count
    return torch.stack([turn.cos(), turn.sin()], 1)


def test_sliced_bars_cover_the_mean_over_all_directions():
    """200 seeds of 40 directions in the plane, truth from a dense fan of them."""
    x, y = normal(40, 2), normal(60, 2, seed=1) * torch.tensor([1.0, 3.0]) + torch.tensor([1.0, 0.0])
    truth = sliced_wasserstein(x, y, directions=angles(2000)).value
    hits = 0
    for seed in range(200):
        estimate = sliced_wasserstein(x, y, projections=40, generator=seeded(seed))
        hits += abs(estimate.value - truth) <= 1.96 * estimate.stderr
    assert 180 <= hits <= 198


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_sliced_gradients_agree_with_finite_differences(monkeypatch, weighted, chunk):
    if chunk:
        monkeypatch.setattr(sliced, "_ENTRIES", {"cpu": chunk})
    x, y = normal(6, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    a = weights(6).requires_grad_()
    directions = random_directions(3, 4, generator=seeded(0))

    def value(x, y, a):
        chosen = a / a.sum() if weighted else None
        return sliced_wasserstein_loss(x, y, p=3, a=chosen, directions=directions)

    assert torch.autograd.gradcheck(value, (x, y, a) if weighted else (x, y, a.detach()))


def test_one_dimension_is_exact_and_seeds_repeat():
    x, y = normal(30, 1), normal(20, 1, seed=1)
    estimate = sliced_wasserstein(x, y)
    assert estimate.value == pytest.approx(float(wasserstein_1d(x, y)))
    assert estimate.stderr == 0
    x, y = normal(30, 4), normal(20, 4, seed=1)
    first, second = (sliced_wasserstein(x, y, generator=seeded(4)) for _ in range(2))
    assert first == second
    assert math.isnan(sliced_wasserstein(x, y, projections=1).stderr)


def test_max_sliced_finds_the_worst_direction():
    x, y = normal(200, 2), normal(150, 2, seed=1) * torch.tensor([1.0, 2.5])
    fan = sliced._costs(sliced.checked_measures(x, y, None, None), angles(5000), 2.0).max().sqrt()
    found = max_sliced_wasserstein(x, y, projections=3, generator=seeded(0))
    assert float(found.value) == pytest.approx(float(fan), rel=1e-4)
    assert float(found.direction.norm()) == pytest.approx(1)
    along = wasserstein_1d(x @ found.direction, y @ found.direction)
    assert float(found.value) == pytest.approx(float(along))


@pytest.mark.parametrize("device", DEVICES)
def test_precision_and_device_are_those_of_the_input(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no accelerator")
    x, y = normal(300, 5).to(device), normal(400, 5, seed=1).to(device) + 1
    directions = random_directions(5, 20, generator=seeded(0))
    for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        u, v = x.to(dtype), y.to(dtype)
        result = sinkhorn_divergence(u, v, epsilon=1.0)
        loss = sliced_wasserstein_loss(u, v, directions=directions)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert result.value.dtype == loss.dtype == kept
        assert result.value.device.type == loss.device.type == device
        assert float(result.value) == pytest.approx(
            float(sinkhorn_divergence(x.cpu(), y.cpu(), epsilon=1.0).value), rel=rel
        )
        assert float(loss) == pytest.approx(
            float(sliced_wasserstein_loss(x.cpu(), y.cpu(), directions=directions)), rel=rel
        )


# Bad input

GOOD = torch.ones(4, 2)
BAD = {
    "NaN": ((torch.full((4, 2), math.nan), GOOD), {}, "not finite"),
    "empty": ((GOOD, GOOD[:0]), {}, "too few samples"),
    "dimensions": ((GOOD, torch.ones(4, 3)), {}, "dimension"),
    "integers": ((GOOD.long(), GOOD), {}, "floating"),
    "an array": ((GOOD.numpy(), GOOD), {}, "torch tensor"),
    "negative weight": ((GOOD, GOOD), {"a": torch.tensor([1.5, -0.5, 0, 0])}, "not negative"),
    "unnormalised": ((GOOD, GOOD), {"b": torch.ones(4)}, "sum to one"),
    "number of weights": ((GOOD, GOOD), {"a": torch.ones(3) / 3}, "one floating weight per sample"),
    "NaN weight": ((GOOD, GOOD), {"a": torch.tensor([math.nan, 0, 0, 1])}, "finite"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("distance", [sinkhorn_divergence, sliced_wasserstein, sliced_wasserstein_loss])
def test_bad_samples_get_one_clear_error(case, distance):
    samples, settings, message = BAD[case]
    with pytest.raises(UserError, match=message):
        distance(*samples, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn_divergence(GOOD, GOOD, epsilon=0.0), "epsilon"),
        (lambda: sinkhorn_divergence(GOOD, GOOD, epsilon=math.nan), "epsilon"),
        (lambda: sinkhorn_divergence(GOOD, GOOD, tol=0), "tol"),
        (lambda: sinkhorn_divergence(GOOD, GOOD, max_iter=0), "max_iter"),
        (lambda: sinkhorn_divergence(GOOD, GOOD, memory=-1), "memory"),
        (lambda: sliced_wasserstein(GOOD, GOOD, p=0.5), "order p"),
        (lambda: sliced_wasserstein(GOOD, GOOD, p=math.inf), "order p"),
        (lambda: sliced_wasserstein(GOOD, GOOD, projections=0), "at least one projection"),
        (lambda: sliced_wasserstein(GOOD, GOOD, directions=torch.ones(3, 5)), "do not fit"),
        (lambda: sliced_wasserstein(GOOD, GOOD, directions=torch.ones(3, 2)), "unit vectors"),
        (lambda: wasserstein_1d(GOOD, GOOD), "on the line"),
    ],
)
def test_bad_settings_get_one_clear_error(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_levels_of_equal_weights_are_exact():
    """With 3 against 7 points the shares of the merged levels are whole multiples of 1/21."""
    u, v = torch.arange(3.0)[None], torch.arange(7.0)[None]
    expected = wasserstein_distance(u[0], v[0])
    assert float(line._equal_weights(u, v, 1.0)) == pytest.approx(expected, rel=1e-6)
