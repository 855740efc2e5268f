"""Energy distance: SciPy, dcor, the closed form, and the fast path against the slow one."""

import pytest
import scipy.stats
import torch

from distmatch.base.errors import UserError
from distmatch.discrepancies import chunks, energy_distance, energy_distance_loss, energy_test, mmd
from distmatch.discrepancies.energy import distance_rows
from tests.reference.discrepancy_truths import covered, energy_1d, samples


def test_the_biased_form_is_the_square_of_scipys():
    x, y = samples(200, 1, 0), samples(150, 1, 1, 0.3, 2.0)
    peer = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y, estimator="biased").value == pytest.approx(peer, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("d", [1, 4])
def test_the_biased_form_is_that_of_dcor(d, exponent):
    dcor = pytest.importorskip("dcor")
    x, y = samples(120, d, 0), samples(90, d, 1, 0.3)
    peer = float(dcor.energy_distance(x.numpy(), y.numpy(), exponent=exponent))
    ours = energy_distance(x, y, exponent=exponent, estimator="biased")
    assert ours.value == pytest.approx(peer, rel=1e-6)


def test_sorting_gives_what_the_matrix_gives():
    # Ties among the samples and across the two sets included.
    x, y = samples(60, 1, 0).round(decimals=1), samples(50, 1, 1, 0.5).round(decimals=1)
    torch.testing.assert_close(distance_rows(x[:, 0], y[:, 0]), (x - y.T).abs().sum(1))
    fast, slow = energy_distance(x, y), mmd(x, y, "energy")
    assert (fast.value, fast.stderr) == pytest.approx((slow.value, slow.stderr), rel=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_intervals_cover_the_closed_form(shift):
    # 200 repetitions (seeds 0..399): binomial sd 1.5 %.
    runs = [energy_distance(samples(80, 1, 2 * i), samples(60, 1, 2 * i + 1, shift, 3.0)) for i in range(200)]
    claimed = [r for r in runs if r.reliable]
    assert len(claimed) >= 190
    assert 0.90 <= covered(claimed, energy_1d(shift, 1.0, 3.0**2)) <= 0.99


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_gradients(d, estimator, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 20)
    x, y = samples(9, d, 0).requires_grad_(), samples(7, d, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: energy_distance_loss(a, b, estimator=estimator), (x, y))


def test_supports_apart_constants_and_refusals():
    # 2 |x - y| for two points: finite wherever they are.
    assert energy_distance(torch.zeros(4, 2), torch.full((5, 2), 1e6)).value == pytest.approx(2e6 * 2**0.5)
    assert energy_distance(torch.ones(4), torch.ones(5)).value == 0.0
    assert energy_test(torch.zeros(6), torch.ones(6), permutations=99).p_value < 0.05
    with pytest.raises(UserError, match="exponent"):
        energy_distance(torch.zeros(4), torch.ones(4), exponent=2)
    for function in (energy_distance, energy_distance_loss):
        with pytest.raises(UserError, match="unbiased"):
            function(torch.zeros(4), torch.ones(4), estimator="linear")
