"""Two sets of samples against each other: known laws give known numbers, and what cannot be is said.

Where a value is compared with the truth, 4 standard errors are allowed for: with jackknife errors from ten
groups that fails for 3 seeds in 1,000, with normal ones for 1 in 16,000. Seeds are fixed.
"""

import math
from dataclasses import replace

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import from_arrays, toy, toy_dataset
from distmatch.discrepancies import median_bandwidth, silverman_bandwidth
from distmatch.divergences import NAMES, divergence_1d
from distmatch.divergences.estimators import LowerBound, kl_neighbors
from distmatch.metrics import compare_datasets, compare_samples
from distmatch.metrics.distances import resampled
from distmatch.metrics.names import EVERYTHING, checked_names
from tests.reference.discrepancy_truths import energy_1d, gaussian_cauchy_schwarz, gaussian_mmd

GAP = torch.tensor([0.6, 0.8])  # of length 1


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plane():
    """N(gap, I) and N(0, I) in two dimensions, and all that is known of them from samples."""
    p, q = normal(1500, 2, 0) + GAP, normal(1500, 2, 1)
    return p, q, compare_samples(p, q, "all,alpha:0.5,gjs:0.3,skew_kl:0.1,renyi:0.5,renyi:2")


@pytest.fixture(scope="module")
def line():
    p, q = normal(1500, 1, 2) + 1, normal(1500, 1, 3)
    return compare_samples(p, q, "energy,wasserstein,sliced_wasserstein,max_sliced_wasserstein,kl_neighbors")


def close(measured, truth, sigmas=4.0):
    assert measured.estimate.warning is None
    assert abs(measured.estimate.value - truth) < sigmas * measured.estimate.stderr


def shift_truth(name):
    """By quadrature in the direction of the gap: the others add nothing."""

    def log_normal(mean):
        return lambda x: -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)

    return float(divergence_1d(name, log_normal(1.0), log_normal(0.0), -12, 13))


@pytest.mark.statistical
@pytest.mark.parametrize("name", [*NAMES, "alpha:0.5", "gjs:0.3", "skew_kl:0.1", "renyi:0.5", "renyi:2"])
def test_bounds_are_below_the_truth_and_not_far_below(plane, name):
    row = plane[2].measured[name]
    truth = shift_truth(name)
    assert isinstance(row.estimate, LowerBound)
    assert row.estimate.value < truth + 4 * row.estimate.stderr
    # A linear critic is perfect here; 1500 samples cost a bound up to half of a heavy-tailed divergence.
    assert row.estimate.value > 0.5 * truth
    assert row.estimate.n == 500
    assert truth < row.largest


def test_kl_by_neighbors_goes_both_ways():
    wide, unit = 2 * normal(500, 1, 0), normal(500, 1, 1)
    found = compare_samples(wide, unit, "kl_neighbors,reverse_kl_neighbors").measured
    forward, backward = kl_neighbors(wide, unit).value, kl_neighbors(unit, wide).value
    assert forward != pytest.approx(backward, rel=0.01)
    # The order of the samples changes the error, not the value.
    assert found["kl_neighbors"].estimate.value == pytest.approx(forward, rel=1e-9)
    assert found["reverse_kl_neighbors"].estimate.value == pytest.approx(backward, rel=1e-9)


def test_distances_in_the_plane(plane):
    p, q, found = plane
    rows = found.measured
    close(rows["mmd"], gaussian_mmd(GAP, 1, 1, median_bandwidth(p, q)))
    close(rows["cauchy_schwarz"], gaussian_cauchy_schwarz(GAP, 1, 1, silverman_bandwidth(p, q)))
    close(rows["sliced_wasserstein"], math.sqrt(1 / 2))  # the root mean of (t.gap)^2
    close(rows["max_sliced_wasserstein"], 1.0)
    close(rows["frechet"], 1.0)
    close(rows["sinkhorn"], 0.5)  # a shift costs half its square, whatever epsilon
    assert rows["max_sliced_wasserstein"].estimate.n == 750
    assert rows["mmd"].estimate.n == 1500


def test_both_sets_are_projected_on_the_same_directions():
    """Two ellipses, one across the other; the truth is the mean over angles of the difference of widths."""
    p, q = (normal(2000, 2, seed) * torch.tensor(s) for seed, s in ((4, [3.0, 1.0]), (5, [1.0, 3.0])))
    rows = compare_samples(p, q, "sliced_wasserstein,max_sliced_wasserstein").measured
    angle = torch.linspace(0, math.pi, 1001, dtype=torch.float64)[:-1]
    c, s = angle.cos(), angle.sin()
    gaps = ((9 * c**2 + s**2).sqrt() - (c**2 + 9 * s**2).sqrt()).square()
    close(rows["sliced_wasserstein"], math.sqrt(float(gaps.mean())))
    close(rows["max_sliced_wasserstein"], 2.0)


def test_distances_on_the_line(line):
    close(line.measured["energy"], energy_1d(1, 1, 1))
    close(line.measured["wasserstein"], 1.0)
    close(line.measured["kl_neighbors"], 0.5)
    assert line.not_computed.keys() == {"sliced_wasserstein", "max_sliced_wasserstein"}


def test_renyi_follows_its_alpha_divergence(plane):
    p, q, _ = plane
    found = compare_samples(p, q, "alpha:2,renyi:2").measured
    alpha, renyi = found["alpha:2"].estimate, found["renyi:2"].estimate
    assert renyi.value == pytest.approx(math.log1p(2 * alpha.value), rel=1e-6)
    step = 1e-4
    slope = (math.log1p(2 * (alpha.value + step)) - math.log1p(2 * (alpha.value - step))) / (2 * step)
    assert renyi.stderr == pytest.approx(slope * alpha.stderr, rel=1e-4)


def test_tests_see_a_difference_and_no_difference(plane):
    for name in ("mmd", "energy"):
        assert plane[2].measured[name].test.p_value == 1 / 1000
    same = compare_samples(normal(500, 2, 0), normal(500, 2, 1), "mmd,energy,mmd:laplace").measured
    assert all(
        row.test.p_value > 0.05 for row in same.values()
    )  # 0.05 of seeds would fail each; seed 0 and 1
    assert {row.test.n for row in same.values()} == {500}


def test_equal_laws_are_not_told_apart():
    p, q = normal(600, 3, 0), normal(600, 3, 1)
    rows = compare_samples(p, q, "js,kl,tv,sliced_wasserstein,frechet,max_sliced_wasserstein").measured
    for name in ("sliced_wasserstein", "frechet", "max_sliced_wasserstein"):
        assert "not distinguishable from 0" in rows[name].estimate.warning
    for name in ("js", "kl", "tv"):
        assert rows[name].estimate.value < 4 * rows[name].estimate.stderr + 1e-9


@pytest.mark.statistical
def test_the_jackknife_error_is_the_spread():
    """Forty repetitions: their spread is known to 11 %, the mean error to less; a fifth is allowed for."""
    found = []
    for seed in range(40):
        p, q = normal(400, 1, seed) + 1, normal(400, 1, 1000 + seed)
        found.append(compare_samples(p, q, "wasserstein", seed=seed).measured["wasserstein"].estimate)
    spread = float(torch.tensor([e.value for e in found]).std())
    error = float(torch.tensor([e.stderr for e in found]).mean())
    assert error == pytest.approx(spread, rel=0.25)


def test_a_biased_statistic_says_so():
    p, q = normal(150, 60, 0) + 0.3, normal(150, 60, 1)
    frechet = compare_samples(p, q, "frechet").measured["frechet"].estimate
    assert frechet.value > 60 * 0.3**2 + 10 * frechet.stderr
    assert "the trend for more is less" in frechet.warning


def test_resampled_takes_the_same_groups_from_both():
    """A difference of means has the standard error of a difference of means."""
    x, y = normal(300, 1, 0)[:, 0] + 5, normal(500, 1, 1)[:, 0]
    draws = torch.Generator().manual_seed(0)
    found = resampled(lambda a, b: float(a.mean() - b.mean()), x, y, draws)
    exact = math.sqrt(float(x.var() / 300 + y.var() / 500))
    assert found.value == pytest.approx(float(x.mean() - y.mean()))
    assert found.stderr == pytest.approx(exact, rel=0.6)  # ten groups know it to a quarter
    assert found.n == 300
    assert found.warning is None


@pytest.mark.statistical
def test_the_score_of_p_is_for_samples_of_q():
    def score(x):
        return -x

    shifted, standard = normal(600, 2, 0) + GAP, normal(600, 2, 1)
    of_q = compare_samples(shifted, standard, "kernel_stein", score_p=score).measured["kernel_stein"]
    of_p = compare_samples(shifted, standard, "kernel_stein", score_q=score).measured["kernel_stein"]
    assert abs(of_q.estimate.value) < 4 * of_q.estimate.stderr
    assert "close to zero" in of_q.estimate.warning
    assert of_q.test.p_value > 0.05
    assert "samples of q" in of_q.meaning
    assert of_p.estimate.value > 10 * of_p.estimate.stderr
    assert of_p.test.p_value == 1 / 1000
    assert "samples of p" in of_p.meaning


def test_everything_is_measured_or_explained(plane):
    found = plane[2]
    assert set(EVERYTHING) <= found.measured.keys() | found.not_computed.keys()
    assert found.not_computed.keys() == {
        *("wasserstein", "kernel_stein", "fisher", "distance_covariance", "conditional_cauchy_schwarz")
    }
    high = compare_samples(normal(300, 8, 0), normal(300, 8, 1))
    assert "8 dimensions" in high.not_computed["kl_neighbors"]
    alone = compare_samples(normal(300, 8, 0), normal(300, 8, 1), "kl_neighbors").measured["kl_neighbors"]
    assert "too few for nearest neighbors in 8 dimensions" in alone.estimate.warning


@pytest.mark.slow
def test_a_seed_fixes_every_number_and_a_subset_changes_none(plane):
    p, q, found = plane
    part = "mmd,js,renyi:2,sliced_wasserstein,frechet"
    again = compare_samples(p, q, part).measured
    assert list(again) == part.split(",")
    for name, row in again.items():
        assert row.to_dict() == found.measured[name].to_dict()
    other = compare_samples(p[:500], q[:500], "js,sliced_wasserstein", seed=1).measured
    first = compare_samples(p[:500], q[:500], "js,sliced_wasserstein").measured
    assert all(other[name].estimate != row.estimate for name, row in first.items())


def test_names():
    assert checked_names("all") == EVERYTHING
    with pytest.warns(UserWarning, match="now called"):
        assert checked_names("kl_neighbours, kl") == ("kl_neighbors", "kl")
    assert checked_names(" Forward-KL, kl,fkl ,MMD:Gaussian,mmd:imq") == ("kl", "mmd", "mmd:imq")
    assert checked_names("gjs:0.3,renyi:2") == ("gjs:0.3", "renyi:2")
    assert set(checked_names("all,alpha:3")) == {*EVERYTHING, "alpha:3"}
    for wrong, hint in (
        ("hellinger,enrgy", "did you mean energy"),
        ("mmd:laplac", "did you mean laplace"),
        ("alpha", "alpha:0.5"),
        ("renyi:x", "renyi:0.5"),
        (",", "separated by commas"),
    ):
        with pytest.raises(UserError, match=hint):
            checked_names(wrong)


@pytest.mark.slow
def test_vectors_keep_their_units():
    p, q = normal(800, 1, 0) + 1, normal(800, 1, 1)
    found = [
        compare_datasets(from_arrays(s * p), from_arrays(s * q), "wasserstein,frechet,js").measured
        for s in (1.0, 8.0)  # a power of two changes no digit
    ]
    close(found[0]["wasserstein"], 1.0)
    for name, power in (("wasserstein", 1), ("frechet", 2)):
        small, large = (f[name].estimate for f in found)
        assert large.value == pytest.approx(8**power * small.value, rel=1e-5)
        assert large.stderr == pytest.approx(8**power * small.stderr, rel=1e-4)
    assert found[1]["js"].estimate.value == pytest.approx(found[0]["js"].estimate.value, rel=1e-3)


def test_images_of_any_type_are_compared_in_one_range():
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 200, (80, 4, 4), generator=generator, dtype=torch.uint8)
    bright = torch.randint(56, 256, (80, 4, 4), generator=generator, dtype=torch.uint8)
    bytes_only = compare_datasets(from_arrays(dark), from_arrays(bright), "energy").measured["energy"]
    mixed = compare_datasets(from_arrays(dark), from_arrays(bright / 255), "energy").measured["energy"]
    assert mixed.estimate.value == pytest.approx(bytes_only.estimate.value, rel=1e-5)


def test_classifier_features_are_those_of_p(tmp_path, monkeypatch):
    """What the labels of p do not tell apart does not show: here the second column."""
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path))
    p, q = normal(600, 2, 0), normal(600, 2, 1)
    labels = (p[:, 0] > 0).long()
    p[:, 0] += 6 * labels
    q[:, 0] += 6 * (q[:, 0] > 0)
    seen = compare_datasets(from_arrays(p, labels), from_arrays(q), "mmd,frechet", features="classifier")
    assert "classifier of p's labels" in seen.notes[0]
    other = compare_datasets(
        from_arrays(p, labels), from_arrays(q[:, [1, 0]]), "mmd,kernel_stein", features="classifier",
        score_p=lambda x: x,
    )  # fmt: skip
    assert seen.measured["mmd"].test.p_value > 0.01
    assert other.measured["mmd"].test.p_value == 1 / 1000
    assert "kernel_stein" in other.not_computed  # a score in another space is no score


def test_toys_have_a_score():
    p, q = toy_dataset("ring8", 500, seed=1), toy_dataset("skewed2", 500, seed=2)
    found = compare_datasets(p, q, "kernel_stein", score_p=toy("ring8").score).measured["kernel_stein"]
    own = compare_datasets(p, p, "kernel_stein", score_p=toy("ring8").score).measured["kernel_stein"]
    assert found.test.p_value == 1 / 1000
    assert own.test.p_value > 0.05


def test_notes_name_what_is_wrong_with_the_samples():
    x = normal(200, 2, 0)
    twice = torch.cat([x[:100], x[:100]])
    notes = compare_samples(x, twice, "frechet").notes
    assert [note.split(":")[0] for note in notes] == [
        "50% of the samples of q repeat others",
        "100 samples are in both sets, which are not independent then",
    ]
    assert compare_samples(x, normal(200, 2, 1), "frechet").notes == ()
    uneven = from_arrays(x * torch.tensor([1.0, 1000.0]))
    (note,) = compare_datasets(uneven, from_arrays(normal(200, 2, 1)), "frechet").notes
    assert "dominates every distance" in note
    (note,) = compare_datasets(
        from_arrays(normal(200, 40, 0)), from_arrays(normal(200, 40, 1)), "frechet"
    ).notes
    assert note.startswith("40 numbers per sample")
    assert (
        compare_datasets(from_arrays(x), from_arrays(x + 1), "frechet", n=50).measured["frechet"].estimate.n
        == 50
    )


def test_what_cannot_be_compared_is_refused():
    x = normal(100, 2, 0)
    with pytest.raises(UserError, match="different shapes"):
        compare_samples(x, normal(100, 3, 0))
    with pytest.raises(UserError, match=r"too few samples of q.*Got: 39"):
        compare_samples(x, x[:39])
    broken = x.clone()
    broken[3, 1] = math.nan
    with pytest.raises(UserError, match="samples of p are not finite"):
        compare_samples(broken, x)
    with pytest.raises(UserError, match="floating-point tensor"):
        compare_samples(x, x.long())
    with pytest.raises(UserError, match=r"none of these can be computed.*score"):
        compare_samples(x, x, "fisher")
    data = from_arrays(x)
    with pytest.raises(UserError, match="kinds or shapes"):
        compare_datasets(data, from_arrays(normal(100, 3, 0)))
    with pytest.raises(UserError, match="labels"):
        compare_datasets(data, data, features="classifier")


def test_the_json_form_leaves_out_what_does_not_apply(plane):
    found = plane[2].to_dict()
    js, kl, mmd = (found["estimates"][name] for name in ("js", "kl", "mmd"))
    assert set(js) == {"value", "stderr", "n", "estimator", "meaning", "largest"}
    assert js["largest"] == pytest.approx(math.log(2))
    assert set(kl) == set(js) - {"largest"}
    assert set(mmd) == set(kl) | {"p_value", "resamples", "test_n"}
    row = replace(plane[2].measured["mmd"], estimate=replace(plane[2].measured["mmd"].estimate, warning="no"))
    assert row.to_dict()["warning"] == "no"
