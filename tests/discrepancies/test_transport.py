"""Transport on the line and sliced, against other packages; and what all of transport refuses or keeps."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from distmatch.base.errors import UserError
from distmatch.discrepancies import sliced, wasserstein
from distmatch.discrepancies.gaussian_transport import gaussian_sinkhorn
from distmatch.discrepancies.sinkhorn import sinkhorn_divergence
from distmatch.discrepancies.sliced import (
    max_sliced_wasserstein,
    random_directions,
    sliced_wasserstein,
    sliced_wasserstein_loss,
)
from distmatch.discrepancies.wasserstein import line_distances, wasserstein_1d
from tests.helpers.draws import normal
from tests.reference.transport_samples import DEVICES, seeded, weighted_pair, weights


@pytest.fixture
def pair():
    return weighted_pair()


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
    assert value.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


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


@pytest.mark.statistical
@pytest.mark.parametrize("d", [2, 10])
def test_a_shift_costs_its_square_over_d(d):
    """W_2 along t of x and x + c is |t.c| exactly, whose square has mean |c|^2 / d over directions."""
    x, shift = normal(50, d), normal(d, seed=5)
    estimate = sliced_wasserstein(x, x + shift, projections=2000, generator=seeded(0))
    assert abs(estimate.value - float(shift.norm()) / math.sqrt(d)) < 3 * estimate.stderr
    assert sliced_wasserstein(x, x).value == 0


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_is_at_most_the_share_of_one_axis(d):
    """SW_2^2 <= W_2^2 / d: along an orthonormal frame the best pairing costs at most its whole cost."""
    x, y = normal(40, d), 0.4 * normal(40, d, seed=1) + normal(d, seed=2)
    costs = torch.cdist(x, y) ** 2
    rows, columns = linear_sum_assignment(costs)
    whole = float(costs[rows, columns].mean())
    for seed in range(5):
        frame = torch.linalg.qr(normal(d, d, seed=10 + seed))[0]
        sliced = sliced_wasserstein(x, y, directions=frame).value ** 2
        assert 0.3 * whole / d < sliced <= whole / d
    # A shift alone costs every axis its part: nothing is lost.
    shifted = sliced_wasserstein(x, x + normal(d, seed=3), directions=frame).value ** 2
    assert shifted == pytest.approx(float(normal(d, seed=3).square().sum()) / d)


def angles(count):
    turn = torch.arange(count, dtype=torch.float64) * math.pi / count
    return torch.stack([turn.cos(), turn.sin()], 1)


@pytest.mark.statistical
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
    fan = sliced._along(line_distances, sliced.checked_measures(x, y, None, None), angles(5000), 2.0).max()
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


GOOD = torch.ones(4, 2)
BAD = {
    "NaN": ((torch.full((4, 2), math.nan), GOOD), {}, "not finite"),
    "empty": ((GOOD, GOOD[:0]), {}, "too few samples"),
    "dimensions": ((GOOD, torch.ones(4, 3)), {}, "dimension"),
    "integers": ((GOOD.long(), GOOD), {}, "floating"),
    "an array": ((GOOD.numpy(), GOOD), {}, "floating-point tensor"),
    "negative weight": ((GOOD, GOOD), {"a": torch.tensor([1.5, -0.5, 0, 0])}, "not be negative"),
    "unnormalized": ((GOOD, GOOD), {"b": torch.ones(4)}, "sum to one"),
    "number of weights": ((GOOD, GOOD), {"a": torch.ones(3) / 3}, "one weight in a per sample"),
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
        (lambda: sliced_wasserstein(GOOD, GOOD, projections=0), "number of projections"),
        (lambda: sliced_wasserstein(GOOD, GOOD, directions=torch.ones(3, 5)), "do not match"),
        (lambda: sliced_wasserstein(GOOD, GOOD, directions=torch.ones(3, 2)), "unit vectors"),
        (lambda: wasserstein_1d(GOOD, GOOD), "on the line"),
        (lambda: gaussian_sinkhorn(*[GOOD] * 4, 1.0), "do not match"),
        (lambda: gaussian_sinkhorn(*[GOOD] * 4, 0.0), "epsilon"),
    ],
)
def test_bad_settings_get_one_clear_error(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_levels_of_equal_weights_are_exact():
    """With 3 against 7 points the shares of the merged levels are whole multiples of 1/21."""
    u, v = torch.arange(3.0)[None], torch.arange(7.0)[None]
    expected = wasserstein_distance(u[0], v[0])
    gaps, share = wasserstein._equal_weights(u, v)
    assert float(gaps.abs() @ share) == pytest.approx(expected, rel=1e-6)
