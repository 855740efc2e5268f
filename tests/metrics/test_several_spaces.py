"""Copies, distances within classes and CMMD by brute force; several feature spaces at once."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from distmatch import data
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.metric_names import CLIP, INCEPTION, published_name
from distmatch.cli.evaluate import HELP
from distmatch.cli.evaluate_options import EvaluateOptions
from distmatch.cli.parse import parse
from distmatch.cli.table import metric_table
from distmatch.metrics import Features, authenticity, cmmd, evaluate, memorized_share, reference_floor
from distmatch.metrics.between import compare_datasets
from distmatch.metrics.frechet import frechet_replicates
from distmatch.metrics.kid import cmmd_replicates
from distmatch.metrics.memorization import memorization_replicates
from distmatch.metrics.notes import marked
from distmatch.metrics.resampling import group_bounds, half_samples, jackknife_stderr
from distmatch.metrics.spaces import resolve_features
from distmatch.metrics.within_class import class_distance_replicates
from distmatch.report.table import present_metrics
from distmatch.training.comparison.stats import Measured, _differences, seed_mean


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def copies(real, fake):
    """Both shares by the definitions."""
    across, within = cdist(fake, real), cdist(real, real)
    np.fill_diagonal(within, np.inf)
    nearest, two = across.argmin(1), np.sort(across, 1)[:, :2]
    return (two[:, 0] > within[nearest].min(1)).mean(), (two[:, 0] < two[:, 1] / 3).mean()


def some_copies(seed=0):
    real, fake = normal(90, 4, seed), normal(70, 4, seed + 1)
    fake[::5] = real[:14] + 0.01 * fake[::5]
    return real, fake


def test_copies_are_counted_as_by_brute_force_in_all_samples_and_in_every_half():
    real, fake = some_copies()
    found = memorization_replicates(real, fake, halves=True)
    for row, part in zip(found, half_samples(), strict=True):
        inside = []
        for x in (real, fake):
            edges = group_bounds(len(x), len(part))
            inside.append(torch.cat([x[edges[g] : edges[g + 1]] for g in part.nonzero()[:, 0].tolist()]))
        assert row.tolist() == pytest.approx(copies(*inside), abs=1e-12)
    assert (authenticity(real, fake), memorized_share(real, fake)) == pytest.approx(copies(real, fake))
    assert (authenticity(real, real), memorized_share(real, real)) == (0, 1)


def test_distances_within_classes_are_those_of_scipy_also_without_each_group():
    real, fake = normal(60, 3, 2), 0.5 * normal(50, 3, 3)
    labels = [torch.arange(n) % 3 for n in (60, 50)]
    labels[1][7], labels[1][9] = -1, 3  # without a label, and a class of one sample

    def by_scipy(keep_real, keep_fake):
        sides = [(real, labels[0], keep_real), (fake, labels[1], keep_fake)]
        means = [[pdist(x[keep & (own == c)]).mean() for c in range(3)] for x, own, keep in sides]
        return np.mean(np.divide(means[1], means[0]))

    found = class_distance_replicates(fake, labels[1], real, labels[0], 5)
    everything = torch.ones(60, dtype=torch.bool), torch.ones(50, dtype=torch.bool)
    assert float(found[0]) == pytest.approx(by_scipy(*everything), rel=1e-9)
    for g in range(5):
        keep = [one.clone() for one in everything]
        for x, one in zip((real, fake), keep, strict=True):
            one[slice(*group_bounds(len(x), 5)[g : g + 2])] = False
        assert float(found[1 + g]) == pytest.approx(by_scipy(*keep), rel=1e-9)
    assert found[0] == pytest.approx(0.5, abs=0.1)


def test_cmmd_is_the_formula_of_the_paper_without_pairs_of_a_sample_with_itself():
    a, b = normal(30, 6, 4) + 1, normal(24, 6, 5)

    def by_numpy(a, b):
        a, b = (
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.double().numpy(), b.double().numpy())
        )
        within = [np.exp(-(pdist(x) ** 2) / 200).mean() for x in (a, b)]
        return 1000 * (sum(within) - 2 * np.exp(-(cdist(a, b) ** 2) / 200).mean())

    assert cmmd(a, b) == pytest.approx(by_numpy(a, b), rel=1e-9)
    assert cmmd(7 * a, b) == pytest.approx(by_numpy(a, b), rel=1e-6)
    edges = group_bounds(24, 4)
    without = torch.cat([b[: edges[1]], b[edges[2] :]])
    first = group_bounds(30, 4)
    found = cmmd_replicates(a, b, 4)
    assert float(found[2]) == pytest.approx(
        by_numpy(torch.cat([a[: first[1]], a[first[2] :]]), without), rel=1e-9
    )


@pytest.fixture(scope="module")
def two():
    """The pixels of some digits, first alone, then with a second space."""
    digits = data.digits().subset(torch.arange(160))
    x, labels = digits.batch(torch.arange(100, 160))
    halves = Features("halves", lambda x: x.flatten(1)[:, :32].float(), fingerprint="abcd1234")
    alone = resolve_features("pixels", digits)
    spaces = (alone, halves, Features("pixels", alone.function, about=alone.about, also=(halves,)))
    found = [
        (reference_floor(digits, features=s, n=30), evaluate(x, digits, labels=labels, features=s))
        for s in spaces
    ]
    return digits, found


def test_several_spaces_give_the_values_of_each_under_keys_of_its_own(two):
    _, (pixels, halves, both) = two
    for one, other, joint in zip(pixels, halves, both, strict=True):
        assert set(joint) == set(one) | {f"{key}@halves" for key in other}
        assert all(joint[key] == value and value.features == "pixels" for key, value in one.items())
        assert all(joint[f"{key}@halves"] == value for key, value in other.items())
        assert {v.features for k, v in joint.items() if "@" in k} == {"halves abcd1234"}
    stored = json.loads(json.dumps(both[1]["fd@halves"].to_dict()))
    assert stored["features"] == "halves abcd1234"
    assert Estimate.from_dict(stored) == both[1]["fd@halves"]


def test_the_space_is_beside_every_number_of_the_tables(two):
    _, (pixels, _, both) = two
    text = metric_table({"reference": both[0], "samples": both[1]})
    rows = [line for line in text.splitlines() if line.startswith("fd ")]
    assert [row.split("  ")[-1].strip() for row in rows] == ["pixels", "halves abcd1234"]
    assert "features" not in metric_table({"reference": pixels[0], "samples": pixels[1]}).split("\n")[0]
    shown = {m.key: m.title for m in present_metrics({k: v.features for k, v in both[1].items()})}
    assert shown["recall@halves"] == "Recall, halves abcd1234"
    assert shown["recall"] == "Recall, pixels"
    assert published_name("fd@inception", INCEPTION) == "FID"
    assert published_name("mmd", CLIP) == "CMMD"
    assert published_name("fd", "inception 12345678") is None


def test_comparisons_judge_every_space(two):
    _, (_, _, both) = two
    good, bad = (
        both[1],
        {k: Estimate(v.value + 50, v.stderr, v.n, features=v.features) for k, v in both[1].items()},
    )
    finished = {name: {seed: Measured(own) for seed in (0, 1)} for name, own in (("a", good), ("b", bad))}
    rows = {
        d["metric"]: d["verdict"] for d in _differences(finished, ["fd@halves", "mmd", "recall@halves"], "a")
    }
    assert rows["fd@halves"] == rows["mmd"] == "worse"
    assert rows["recall@halves"] == "better"
    assert seed_mean("fd@halves", [Measured(good)] * 2).features == "halves abcd1234"


def test_features_that_the_method_was_trained_on_are_marked(two):
    _, (_, _, both) = two
    found = marked({**both[1], "nfe": 1}, {"mmd_features": "samples"})
    assert all("trained on" in v.warning for v in found.values() if getattr(v, "features", "") == "pixels")
    assert found["fd@halves"] == both[1]["fd@halves"]
    assert marked(both[1], {"mmd_features": "teacher"}) == both[1] == marked(both[1], {})


def test_names_are_given_as_words_or_with_commas(two):
    digits, _ = two

    def given(*argv):
        return parse(EvaluateOptions, ["a.npz", *argv], verb="evaluate", said=HELP).features

    assert given("--features", "pixels", "classifier") == given("--features", "pixels,classifier")
    assert (
        parse(EvaluateOptions, ["--features", "pixels", "a.npz", "b"], verb="evaluate", said=HELP).against
        == "b"
    )
    space = resolve_features("pixels, auto,pixels", digits.subset(torch.arange(20)).without_labels())
    assert (space.name, space.also) == ("pixels", ())
    with pytest.raises(UserError, match="feature space"):
        resolve_features("pixels,piksels", digits)
    with pytest.raises(UserError, match="one feature space"):
        compare_datasets(digits, digits, "mmd", features="pixels,efficientnet-lite0")


@pytest.mark.parametrize(("n", "d"), [(300, 40), (60, 60), (70, 120)])
def test_the_linearized_jackknife_of_the_frechet_distance_is_near_the_exact_one(monkeypatch, n, d):
    mix = normal(d, d, 6) / d**0.5
    a, b = normal(n, d, 7) @ mix, 1.2 * normal(n + 10, d, 8) @ mix + 0.2
    exact = frechet_replicates(a, b, 10)
    monkeypatch.setitem(frechet_replicates.__globals__, "_MOST_EXACT", 1)
    found = frechet_replicates(a, b, 10)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-9)
    assert (found[1:] <= exact[1:] + 1e-9).all()  # a tangent of a convex function
    assert 0.75 < float(jackknife_stderr(found) / jackknife_stderr(exact)) < 1.05
