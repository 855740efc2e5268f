"""Lower bounds by a critic trained for them: what it finds, and what it says it cannot see."""

import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.divergences import NAMES, divergence, divergence_1d
from distmatch.divergences.estimators import (
    Training,
    VariationalEstimator,
    chi_square_bound,
    classifier_estimates,
    donsker_varadhan_bound,
    f_gan_bound,
    monte_carlo,
)
from distmatch.divergences.estimators.critic import Critic, ascend, logistic, split
from distmatch.divergences.estimators.variational import _blindness

QUICK = Training(width=16, steps=100, batch=128)


def draw(n: int, d: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(mean: float):
    return lambda x: -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def test_the_parts_are_disjoint_and_complete():
    x = torch.arange(100.0)[:, None]
    train, validation, test = split(x, torch.Generator().manual_seed(0))
    assert (len(train), len(validation), len(test)) == (50, 16, 34)
    assert torch.equal(torch.cat([train, validation, test]).sort(0).values, x)
    x_p, x_q = draw(90), draw(120, seed=1)
    critic, test_p, test_q = VariationalEstimator("js", training=QUICK).train(x_p, x_q, seed=3)
    assert (len(test_p), len(test_q)) == (30, 40)
    assert not any(p.requires_grad for p in critic.parameters())


@pytest.mark.statistical
@pytest.mark.parametrize("bound", ["js", "kl", "nwj", "donsker_varadhan", "chi_square", "tv"])
def test_a_trained_critic_comes_close_to_the_truth(bound):
    """Two normals a unit apart; the critic may lose a little, the test part of 667 adds its error."""
    x_p, x_q = draw(2000) + 1.0, draw(2000, seed=1)
    found = VariationalEstimator(bound, training=QUICK).fit(x_p, x_q)
    kl = 0.5
    truth = {
        "js": float(divergence_1d(divergence("js"), normal(1.0), normal(0.0), -10, 11)),
        "kl": kl,
        "nwj": kl,
        "donsker_varadhan": kl,
        "chi_square": math.e - 1,
        "tv": math.erf(0.5 / math.sqrt(2)),
    }[bound]
    assert 0.5 * truth < found.value < truth + 3 * found.stderr
    again = VariationalEstimator(bound, training=QUICK).fit(x_p, x_q)
    assert (again.value, again.stderr) == (found.value, found.stderr)


@pytest.mark.statistical
def test_equal_distributions_show_no_divergence():
    found = VariationalEstimator("kl", training=QUICK).fit(draw(900, 5), draw(900, 5, seed=1))
    assert abs(found.value) <= 3 * found.stderr + 1e-12


@pytest.mark.parametrize("bound", ["js", "donsker_varadhan", "chi_square"])
def test_a_critic_that_cannot_see_says_so(bound):
    """Fifty dimensions, spread 1.15 times as wide: JS is 0.1, and 400 training samples show nothing of it."""
    x_p, x_q = 1.15 * draw(800, 50), draw(800, 50, seed=1)
    found = VariationalEstimator(bound, training=QUICK).fit(x_p, x_q)
    assert found.value < 3 * found.stderr + 1e-12
    assert "uninformative" in found.warning
    assert "uninformative" in classifier_estimates(x_p, x_q, ["js"], training=QUICK)["js"].warning
    seen = VariationalEstimator(bound, training=QUICK).fit(x_p + 0.3, x_q)  # a shift is seen
    assert seen.value > 0.1
    assert "uninformative" not in (seen.warning or "")


@pytest.mark.statistical
@pytest.mark.parametrize("d", [1, 2, 5])
def test_equal_distributions_in_few_dimensions_are_no_cause_for_warning(d):
    for seed in range(3):
        x_p, x_q = draw(900, d, seed=seed), draw(900, d, seed=10 + seed)
        found = VariationalEstimator("js", training=QUICK).fit(x_p, x_q, seed)
        assert found.reliable, found
        assert abs(found.value) <= 3 * found.stderr + 1e-12


def test_a_critic_that_has_learnt_its_samples_by_heart_says_so():
    """Twenty dimensions, alike: without early stopping it fits 250 samples, others show nothing."""
    train = draw(250, 20, seed=5), draw(250, 20, seed=6)
    others = draw(100, 20, seed=7), draw(100, 20, seed=8)
    critic = Critic(torch.cat(train), width=16, seed=0)
    assert _blindness(critic, train, others) is None
    how = Training(width=16, steps=100, lr=0.02)
    ascend(critic, logistic, train, train, how, torch.Generator().manual_seed(0))
    assert "memorized" in _blindness(critic, train, others)
    assert _blindness(critic, train, train) is None


def test_one_classifier_bounds_every_divergence():
    bounds = classifier_estimates(draw(2000) + 1.0, draw(2000, seed=1), training=QUICK)
    assert set(bounds) == set(NAMES)
    log_p, log_q = (-0.5 * (draw(100_000, seed=2).squeeze(1) - m) ** 2 for m in (1.0, 0.0))
    for name, found in bounds.items():
        truth = monte_carlo(name, log_p, log_q)
        assert found.value < truth.value + 3 * math.hypot(found.stderr, truth.stderr)
        if found.reliable and name not in ("pearson", "neyman"):
            assert found.value > 0.5 * truth.value


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_one_classifier_is_scaled_for_each_divergence_as_if_it_were_the_only_one(shift):
    x_p, x_q = draw(600) + shift, draw(600, seed=1)
    bounds = classifier_estimates(x_p, x_q, ["kl", "pearson", "js"], seed=2, training=QUICK)
    for name, found in bounds.items():
        alone = VariationalEstimator(name, "classification", QUICK).fit(x_p, x_q, seed=2)
        assert (found.value, found.stderr) == (pytest.approx(alone.value), pytest.approx(alone.stderr))
        assert found.warning == alone.warning


def test_training_ends_in_the_best_state_on_other_samples():
    """Here they are the training samples with p and q exchanged, so that the start is the best."""
    x_p, x_q = draw(100) + 1.0, draw(100, seed=1)
    critic = Critic(torch.cat([x_p, x_q]), width=16, seed=0)
    ascend(critic, logistic, (x_p, x_q), (x_q, x_p), QUICK, torch.Generator().manual_seed(0))
    assert torch.equal(critic.at(x_p), torch.zeros(100, dtype=torch.float64))
    ascend(critic, logistic, (x_p, x_q), (x_p, x_q), QUICK, torch.Generator().manual_seed(0))
    assert critic.at(x_p).mean() > 0.3


def test_supports_that_do_not_overlap():
    x_p, x_q = draw(300) + 100.0, draw(300, seed=1)
    js = VariationalEstimator("js", training=QUICK).fit(x_p, x_q)
    assert js.value == pytest.approx(math.log(2), abs=0.03)
    kl = VariationalEstimator("donsker_varadhan", training=QUICK).fit(x_p, x_q)
    assert not kl.reliable
    assert kl.value > 1.0


@pytest.mark.parametrize("bound", ["donsker_varadhan", "nwj", "chi_square"])
def test_a_critic_that_sees_more_than_the_samples_can_show_is_held_back(bound):
    """A shift of 5: KL is 12.5 and log n is 6.7. What is reported is no more than the truth, and says so."""
    x_p, x_q = draw(800) + 5.0, draw(800, seed=1)
    found = VariationalEstimator(bound, training=QUICK).fit(x_p, x_q)
    assert not found.reliable
    assert 0.5 < found.value < (12.5 if bound != "chi_square" else math.expm1(25.0))
    assert bound == "chi_square" or "far above" in found.warning


def test_float32_stays_float32_and_images_are_flattened():
    x = draw(200, 12).float().reshape(200, 3, 2, 2)
    critic, test_p, _ = VariationalEstimator("js", training=QUICK).train(x, x + 0.5)
    assert test_p.shape == (200 - 100 - 33, 12)
    assert next(critic.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x_p", "x_q", "word"),
    [
        (draw(10), draw(100), "too few"),
        (draw(100), draw(100, 2), "different shapes"),
        (draw(100), torch.full((100, 1), math.nan, dtype=torch.float64), "not finite"),
        (torch.zeros(100, 1), draw(100), "all equal"),
        (torch.ones(100, 1, dtype=torch.int64), draw(100), "floating-point"),
        (torch.zeros(100, 0), torch.zeros(100, 0), "no coordinates"),
        (draw(100).numpy(), draw(100), "tensor"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(x_p, x_q, word):
    with pytest.raises(UserError, match=word):
        VariationalEstimator("js", training=QUICK).fit(x_p, x_q)
    with pytest.raises(UserError, match=word):
        classifier_estimates(x_p, x_q, training=QUICK)


def test_unknown_bounds_and_bad_critics_are_refused():
    with pytest.raises(UserError, match="donsker_varadhan"):
        VariationalEstimator("donsker")
    with pytest.raises(UserError, match="number"):
        VariationalEstimator("alpha:x")
    with pytest.raises(UserError, match="training objective"):
        VariationalEstimator("js", train_on="hope")
    with pytest.raises(UserError, match="not finite"):
        f_gan_bound("js", torch.tensor([0.0, math.nan]), torch.zeros(2))
    with pytest.raises(UserError, match="one value per sample"):
        donsker_varadhan_bound(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(UserError, match="floating-point"):
        chi_square_bound(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
