"""The protocol: fresh data scores the floor, broken models do not, and the standard errors are honest."""

import pytest
import torch

from distmatch import data
from distmatch.base import seeds
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.metrics import (
    Features,
    classifier_features,
    evaluate,
    frechet_distance,
    plan,
    prdc,
    reference_floor,
    reference_labels,
)
from distmatch.metrics.blocks import _unstable, block_estimates, block_replicates
from distmatch.metrics.classifier import _train
from distmatch.metrics.features import _fingerprint
from distmatch.metrics.reference import reference_rows

KEYS = {"fd", "kid", "mmd", "precision", "recall", "density", "coverage", "vendi"}
COPIES = {"authentic", "memorized"}


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def features(digits, tmp_path_factory):
    return classifier_features(digits, tmp_path_factory.getbasetemp() / "classifiers")


@pytest.fixture(scope="module")
def floor(digits, features):
    return reference_floor(digits, features=features, n=400)


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def z(a, b):
    return (a.value - b.value) / (a.stderr**2 + b.stderr**2) ** 0.5


def test_the_values_are_those_of_the_blocks():
    reference, x = normal(200, 3, 0), normal(130, 3, 1) * 1.2
    result = evaluate(x, reference, seed=5)
    assert set(result) == KEYS | COPIES
    assert all(e.n == 65 and e.stderr > 0 for k, e in result.items() if k != "memorized")
    a, b = reference[reference_rows(reference, 130, 5, stratified=False)].split(65)
    assert not (a[:, None] == b[None]).all(-1).any()  # disjoint
    floor = reference_floor(reference, n=65, seed=5)
    assert floor["fd"].value == pytest.approx(frechet_distance(a, b), rel=1e-9)
    both = prdc(a, b), prdc(b, a)
    for name in ("precision", "recall", "density", "coverage"):
        assert floor[name].value == pytest.approx(sum(getattr(p, name) for p in both) / 2, rel=1e-9)
    # one reference block against itself, through the same door
    same = block_estimates([block_replicates(a, a)], [a], 65)
    assert same["fd"].value == pytest.approx(0, abs=1e-9)
    assert [same[k].value for k in ("precision", "recall", "density", "coverage")] == [1, 1, 1, 1]
    assert (same["authentic"].value, same["memorized"].value) == (0, 1)


def test_same_seed_same_values_and_the_order_of_samples_is_not_trusted():
    reference, x = normal(300, 3, 0), normal(300, 3, 1)
    assert evaluate(x, reference, seed=1) == evaluate(x, reference, seed=1)
    assert evaluate(x, reference, seed=1) != evaluate(x, reference, seed=2)
    # sorted samples: without a random order the two blocks would be the two tails
    tails = x[x[:, 0].argsort()]
    assert abs(z(evaluate(tails, reference)["fd"], evaluate(x, reference)["fd"])) < 2


@pytest.mark.statistical
def test_fresh_data_scores_the_floor():
    # Independent repetitions; the mean difference in units of its own spread.
    rows = []
    for i in range(40):
        reference, x = normal(120, 3, 2 * i), normal(120, 3, 2 * i + 1)
        model, floor = evaluate(x, reference), reference_floor(reference)
        rows.append([model[k].value - floor[k].value for k in sorted(KEYS)])
    table = torch.tensor(rows)
    assert (table.mean(0).abs() < 4 * table.std(0) / 40**0.5).all()


@pytest.mark.slow
@pytest.mark.statistical
def test_standard_errors_match_the_spread_over_repetitions():
    # 60 repetitions know the spread to 9 %; half-samples and the jackknife are then allowed a bias of 20 %.
    results = [evaluate(normal(240, 4, 2 * i) * 1.2 + 0.5, normal(240, 4, 2 * i + 1)) for i in range(60)]
    for name in KEYS:
        spread = torch.tensor([r[name].value for r in results]).std()
        claimed = torch.tensor([r[name].stderr for r in results]).square().mean().sqrt()
        assert 0.65 < float(claimed / spread) < 1.5, name


def test_broken_models_are_worse_than_the_floor(digits, features, floor):
    x, labels = digits.batch(torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:800])
    good = evaluate(x, digits, labels=labels, features=features)
    noise = 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    noisy = evaluate(x + noise, digits, labels=labels, features=features)
    first = torch.stack([(labels == c).nonzero()[0, 0] for c in range(10)])[labels]
    collapsed = evaluate(x[first], digits, labels=labels, features=features)
    assert set(good) == KEYS | COPIES | {"label_accuracy", "class_distance"}
    assert good["fd"].value < 2 * floor["fd"].value < noisy["fd"].value < collapsed["fd"].value
    for broken in (noisy, collapsed):
        assert z(broken["fd"], floor["fd"]) > 3
        assert z(broken["coverage"], floor["coverage"]) < -4
    assert z(noisy["precision"], floor["precision"]) < -4
    assert z(collapsed["recall"], floor["recall"]) < -4
    assert z(collapsed["vendi"], floor["vendi"]) < -4


def test_label_accuracy_sees_swapped_labels(digits, features, floor):
    x, labels = digits.batch(torch.arange(800))
    right = evaluate(x, digits, labels=labels, features=features)["label_accuracy"]
    swapped = evaluate(x, digits, labels=(labels + 1) % 10, features=features)["label_accuracy"]
    assert right.value > 0.97
    assert right.n == 800
    assert swapped.value < 0.05
    assert floor["label_accuracy"] == features.heldout_accuracy
    half = torch.where(torch.arange(800) % 2 == 0, labels, -1)
    assert evaluate(x, digits, labels=half, features=features)["label_accuracy"].n == 400


def test_stratified_blocks_lower_the_floor_of_conditional_models(digits, features):
    stratified = [reference_floor(digits, features=features, n=300, seed=s)["fd"].value for s in range(8)]
    random = [
        reference_floor(digits, features=features, n=300, seed=s, stratified=False)["fd"].value
        for s in range(8)
    ]
    assert sum(stratified) < 0.8 * sum(random)


def test_mixture_adds_the_mode_keys():
    ring, reference = data.toy("ring8"), data.toy_dataset("ring8", 2000)
    floor = reference_floor(reference, mixture=ring)
    assert set(floor) == KEYS | COPIES | {"class_distance", "modes", "kl", "reverse_kl", "js"}
    assert floor["modes"].value == 8
    assert floor["modes"].n == 2000
    assert floor["kl"].value < 0.01
    x = reference.raw[reference.labels < 5]
    dropped = evaluate(x, reference, mixture=ring)
    assert dropped["modes"].value == 5
    assert dropped["kl"].value > 1
    assert dropped["js"].value < 0.7


def test_plan_says_what_will_be_used(digits, features):
    settings = plan(digits, 900, features=features, n=1000, seed=4)
    assert settings.to_dict() == {
        "features": "classifier",
        "n": 450,
        "seed": 4,
        "groups": 10,
        "k_precision": 3,
        "k_coverage": 5,
    }
    assert plan(digits, features="pixels").n == 898
    assert plan(torch.zeros(50_000, 2), 40_000).n == 5000


def test_more_dimensions_than_samples():
    wide = Features("wide", lambda x: torch.cat([x, x.square()], 1) @ normal(6, 80, 9))
    result = evaluate(normal(60, 3, 0), normal(60, 3, 1), features=wide)
    assert all(torch.isfinite(torch.tensor([e.value, e.stderr])).all() for e in result.values())


def test_the_smallest_allowed_set_works_and_one_less_is_refused():
    assert evaluate(normal(24, 2, 0), normal(24, 2, 1))["fd"].n == 12
    with pytest.raises(UserError, match="generate more samples"):
        evaluate(normal(23, 2, 0), normal(24, 2, 1))
    with pytest.raises(UserError, match="larger reference"):
        evaluate(normal(24, 2, 0), normal(23, 2, 1))
    with pytest.raises(UserError, match="raise n"):
        evaluate(normal(24, 2, 0), normal(24, 2, 1), n=4)


def test_users_mistakes(digits):
    x = torch.zeros(50, 1, 8, 8)
    broken = x.clone()
    broken[3, 0, 0, :2] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity in 1 of 50"):
        evaluate(broken, digits)
    with pytest.raises(UserError, match="another shape"):
        evaluate(x[..., :7], digits)
    with pytest.raises(UserError, match="floating point"):
        evaluate(x.to(torch.uint8), digits)
    with pytest.raises(UserError, match="one label per sample"):
        evaluate(x, digits, labels=reference_labels(digits, 49))
    with pytest.raises(UserError, match="floating point"):
        evaluate(normal(30, 2, 0), torch.zeros(30, 2, dtype=torch.int64))


def test_repeats_in_the_reference_are_said_where_neighbors_are_counted():
    atoms = normal(10, 3, 0)
    draws = torch.randint(10, (2, 400), generator=torch.Generator().manual_seed(0))
    real, fake = (atoms[d] for d in draws)
    found, floor = evaluate(fake, real, features="pixels"), reference_floor(real, features="pixels")
    for block in (found, floor):
        assert block["density"].value == pytest.approx(1, abs=0.15)  # of 20 copies each; 1 + 1/20 and noise
        assert block["coverage"].value == 1
        for name in ("precision", "recall", "density", "coverage"):
            assert "repeat others" in block[name].warning
        assert block["fd"].warning is None
    assert evaluate(normal(200, 3, 1), normal(200, 3, 2), features="pixels")["density"].warning is None


def test_trained_features_have_a_fingerprint_without_its_rounding(features, digits, monkeypatch):
    assert len(features.fingerprint) == 8
    assert features.fingerprint in features.description
    assert "do not include the choice" in features.description
    monkeypatch.setitem(_train.__globals__, "_STEPS", (20, 20))
    net, _, _ = _train(digits, digits.labels)
    before = _fingerprint(net)
    for statistic in (net.mean, net.std):
        statistic.mul_(1 + 1e-6)
    assert _fingerprint(net) == before
    with monkeypatch.context() as patch:  # other random numbers
        patch.setattr(seeds, "stream_seed", lambda seed, name: 1 + seed)
        other, _, _ = _train(digits, digits.labels)
    assert _fingerprint(other) != before


def test_shares_whose_errors_reach_far_out_of_their_range_are_called_unstable():
    """Value and error may leave [0, 1] by 0.05; figures of collapsed models, and ordinary ones."""
    replicates = torch.tensor([[0.4] * 4 + [0.0] * 10, [0.0] * 14], dtype=torch.float64)
    for name, value, stderr, said in (
        ("precision", 0.0, 0.15, True),
        ("recall", 1.0, 0.24, True),
        ("coverage", 0.01169, 0.12, True),
        ("density", 0.01, 0.12, True),
        ("precision", 0.0575, 0.2, True),
        ("density", 1.2, 0.4, False),
        ("precision", 0.97, 0.04, False),
        ("recall", 0.5, 0.3, False),
        ("recall", 0.0, 0.0, False),
    ):
        why = _unstable(name, Estimate(value, stderr, 100), replicates)
        assert (why is not None) == said, (name, value, stderr)
        if why is not None:
            assert "0 to 0.4" in why


def test_a_collapsed_model_is_called_unstable_and_its_figures_stay(digits):
    """400 noisy copies of one digit: which halves hold its few neighbors decides the precision."""
    x, _ = digits.batch(torch.arange(1797))
    collapsed = x[:1] + 0.3 * normal(400, 64, 0).reshape(400, 1, 8, 8)
    found = evaluate(collapsed, digits, features="pixels", n=200)
    precision = found["precision"]
    assert precision.value - precision.stderr < -0.05
    assert precision.warning is not None
    assert "unstable" in precision.warning
    assert found["fd"].warning is None
    fresh = evaluate(x[:400], digits, features="pixels", n=200)
    assert all(estimate.warning is None for estimate in fresh.values())
