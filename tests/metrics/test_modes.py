"""Mode counts on mixtures where every number can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.metrics import mode_counts


def mixture(weights, means, covariances):
    return SimpleNamespace(
        weights=torch.tensor(weights), means=torch.tensor(means), covariances=torch.tensor(covariances)
    )


TINY = [[0.01, 0.0], [0.0, 0.01]]
THREE = mixture([0.5, 0.3, 0.2], [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], [TINY] * 3)


def at(counts):
    return torch.cat([m.expand(c, 2) for m, c in zip(THREE.means, counts, strict=True)])


def test_histogram_and_divergences_by_hand():
    report = mode_counts(at([8, 2, 0]), THREE)
    q = [8.5 / 11.5, 2.5 / 11.5, 0.5 / 11.5]
    p = [0.5, 0.3, 0.2]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    assert report.modes.value == 2
    assert report.high_quality.value == 1
    assert report.histogram.tolist() == pytest.approx(q, rel=1e-6)
    assert report.kl.value == pytest.approx(kl(p, q), rel=1e-5)
    assert report.reverse_kl.value == pytest.approx(kl(q, p), rel=1e-5)
    assert report.js.value == pytest.approx((kl(p, m) + kl(q, m)) / 2, rel=1e-5)


def test_the_radius_is_in_standard_deviations_of_each_component():
    wide = mixture([0.5, 0.5], [[0.0, 0.0], [20.0, 0.0]], [TINY, [[1.0, 0.0], [0.0, 4.0]]])
    x = torch.tensor([[0.29, 0.0], [0.31, 0.0], [20.0, 5.9], [20.0, 6.1], [23.1, 0.0]])
    report = mode_counts(x, wide)
    assert report.high_quality.value == pytest.approx(2 / 5)
    assert report.modes.value == 2
    assert mode_counts(x, wide, radius=0.5).modes.value == 0


def test_correlated_covariances_use_the_whole_matrix():
    tilted = mixture([1.0], [[0.0, 0.0]], [[[1.0, 0.99], [0.99, 1.0]]])
    along, across = torch.tensor([[1.5, 1.5]]), torch.tensor([[1.5, -1.5]])
    assert mode_counts(along, tilted).high_quality.value == 1
    assert mode_counts(across, tilted).high_quality.value == 0


def test_responsibilities_by_hand():
    two = mixture([0.7, 0.3], [[0.0], [1.0]], [[[1.0]], [[0.25]]])
    first, second = 0.7 * math.exp(-(0.3**2) / 2), 0.3 / 0.5 * math.exp(-((0.7 / 0.5) ** 2) / 2)
    expected = (first / (first + second) + 0.5) / 2  # one sample, half a sample added to each of two
    assert float(mode_counts(torch.tensor([[0.3]]), two).histogram[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.statistical
def test_shares_of_a_mixture_are_its_weights_also_where_components_overlap():
    g = torch.Generator().manual_seed(0)
    close = mixture([0.7, 0.3], [[0.0], [1.0]], [[[1.0]], [[0.25]]])
    n = 20_000
    which = (torch.rand(n, generator=g) < 0.3).long()
    x = close.means[which] + torch.randn(n, 1, generator=g) * torch.tensor([1.0, 0.5])[which, None]
    # hard assignment to the nearer mean would be off by 0.1; the standard error is at most 0.0033
    assert abs(float(mode_counts(x, close).histogram[1]) - 0.3) < 4 * 0.0033
    assert mode_counts(x, close).kl.value < 1e-3


@pytest.mark.statistical
def test_standard_errors_match_the_spread_over_repetitions():
    # Away from q = p, with all counts large, the delta method is exact to order 1 / n; the spread over 200
    # repetitions is good to 5 %.
    g = torch.Generator().manual_seed(1)
    names = ("kl", "reverse_kl", "js")
    rows = []
    for _ in range(200):
        counts = torch.bincount(
            torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), 500, True, generator=g), minlength=3
        )
        report = mode_counts(at(counts.tolist()), THREE)
        rows.append([(getattr(report, k).value, getattr(report, k).stderr) for k in names])
    table = torch.tensor(rows)
    ratio = table[:, :, 1].mean(0) / table[:, :, 0].std(0)
    assert ((ratio > 0.85) & (ratio < 1.15)).all(), ratio


def test_number_of_modes_is_uncertain_only_where_counts_are_small():
    assert mode_counts(at([50, 50, 50]), THREE).modes.stderr < 1e-6
    assert mode_counts(at([50, 50, 1]), THREE).modes.stderr == pytest.approx(
        math.sqrt(math.exp(-1) * (1 - math.exp(-1)))
    )


def test_chunks_do_not_change_the_report(monkeypatch):
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(2)) * 3
    whole = mode_counts(x, THREE)
    monkeypatch.setattr("distmatch.metrics.modes._ELEMENTS", 7 * 6)
    assert mode_counts(x, THREE).kl == whole.kl


def test_wrong_dimension_is_the_users_to_fix():
    with pytest.raises(UserError, match="do not match the mixture"):
        mode_counts(torch.zeros(5, 3), THREE)
