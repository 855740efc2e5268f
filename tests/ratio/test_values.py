"""Mass tests, and divergences from ratios."""

import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.divergences import divergence, divergence_1d
from distmatch.nets.head import RatioNet
from distmatch.ratio import MassTests, divergence_from_ratio, fit_ratio, mass_tests
from distmatch.ratio.diagnostics import mean_estimate

SHIFT, SCALE = 0.5, 0.9


def draw(n, seed, shift=SHIFT, scale=SCALE):
    g = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, 1, generator=g, dtype=torch.float64)


def log_r(x):
    return (-0.5 * ((x - SHIFT) / SCALE) ** 2 - math.log(SCALE) + 0.5 * x**2).sum(1)


def exact(which):
    normal = torch.distributions.Normal
    p, q = normal(SHIFT, SCALE), normal(0.0, 1.0)
    return divergence_1d(divergence(which), p.log_prob, q.log_prob, -12.0, 12.0).item()


def covers(estimate, value):
    return abs(estimate.value - value) <= 1.96 * estimate.stderr


@pytest.mark.statistical
def test_the_true_ratio_passes():
    mass = mass_tests(log_r(draw(5000, 1)), log_r(draw(5000, 2, 0.0, 1.0)))
    assert isinstance(mass, MassTests)
    assert mass.passed
    assert mass.q.reliable
    assert mass.q.value == pytest.approx(1.0, abs=4 * mass.q.stderr)
    assert mass.balance.n == 10_000


WRONG = {
    "scaled": lambda x: log_r(x) + math.log(1.25),
    "sharpened": lambda x: 1.5 * log_r(x),
    "flattened": lambda x: 0.3 * log_r(x),
    "upside down": lambda x: -log_r(x),
    "shifted": lambda x: log_r(x + 0.5),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_ratio_is_found(kind):
    wrong = WRONG[kind]
    mass = mass_tests(wrong(draw(5000, 1)), wrong(draw(5000, 2, 0.0, 1.0)))
    assert not mass.passed
    assert "wrong" in mass.failures()[0]


def test_masses_that_cannot_be_measured_say_so():
    far = 6.0
    p, q = draw(1000, 1, far, 1.0), draw(1000, 2, 0.0, 1.0)
    mass = mass_tests(far * p[:, 0] - far**2 / 2, far * q[:, 0] - far**2 / 2)  # exact, KL = 18
    assert not mass.q.reliable
    assert not mass.p.reliable
    assert mass.balance.value == pytest.approx(0.0, abs=0.01)
    assert "cannot be estimated" in mass.failures()[0]


def test_the_samples_a_mass_needs_are_counted_from_the_other_side():
    """exp(KL + spread of log r under p): 4 + 4 is more than log 1000 = 6.9, 4 + 1 is less."""
    on_q = torch.linspace(-0.1, 0.1, 1000)
    wide, narrow = (4.0 + spread * torch.tensor([-1.0, 1.0]).repeat(500) for spread in (4.0, 1.0))
    assert "about 2987 would" in mass_tests(wide, on_q).q.warning  # exp of 4 + 4 sqrt(1000 / 999)
    assert mass_tests(narrow, on_q).q.reliable


@pytest.mark.parametrize("side", [0, 1])
def test_a_balance_that_rests_on_one_sample_says_so(side):
    one = torch.full((1000,), -20.0)
    one[0] = 20.0
    usual = torch.linspace(-1, 1, 1000)
    on_p, on_q = (-one, usual) if side else (usual, one)
    assert "a few samples" in mass_tests(on_p, on_q).balance.warning
    assert mass_tests(usual, usual).balance.reliable


def test_logits_of_the_distillers_discriminator_can_be_tested():
    """A RatioNet, trained for a moment at one noise level: its logit is log p_t/q_t."""
    g = torch.Generator().manual_seed(0)
    sigma = torch.full((2000,), 0.4)

    def noised(n, shift, scale):
        return shift + scale * torch.randn(n, 2, generator=g) + 0.4 * torch.randn(n, 2, generator=g)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = RatioNet((2,), 0, width=32, depth=1)
    fresh_p, fresh_q = noised(2000, SHIFT, SCALE), noised(2000, 0.0, 1.0)
    untrained = mass_tests(net(fresh_p, sigma), net(fresh_q, sigma))  # its logits are 0: r = 1 passes
    assert (untrained.q.value, untrained.p.value, untrained.balance.value) == (1.0, 1.0, 0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)  # ends at 0: little noise is left
    for _ in range(100):
        on_p, on_q = net(noised(256, SHIFT, SCALE), sigma[:256]), net(noised(256, 0.0, 1.0), sigma[:256])
        loss = torch.nn.functional.softplus(-on_p).mean() + torch.nn.functional.softplus(on_q).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    logits = net(fresh_p, sigma), net(fresh_q, sigma)
    assert mass_tests(*logits).passed
    assert mass_tests(*logits).q.stderr > 0
    upside_down, scaled = mass_tests(*(-x for x in logits)), mass_tests(*(x + 0.4 for x in logits))
    assert not upside_down.passed
    assert len(scaled.failures()) == 3


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (torch.zeros(1), torch.zeros(5)),
        (torch.zeros(5), torch.tensor([0.0, math.nan])),
        (torch.zeros(5, 1), torch.zeros(5)),
    ],
)
def test_mass_tests_refuse_what_is_no_sample(p, q):
    with pytest.raises(UserError):
        mass_tests(p, q)


def test_means_dominated_by_few_samples_carry_a_warning():
    assert mean_estimate(torch.randn(100, generator=torch.Generator().manual_seed(0))).reliable
    assert not mean_estimate(torch.cat([torch.zeros(99), torch.ones(1)])).reliable
    assert not mean_estimate(torch.ones(1)).reliable
    huge = mean_estimate(torch.tensor([0.0, 1e300, 1e300, 0.0], dtype=torch.float64))
    assert huge.value == pytest.approx(5e299)
    assert huge.stderr == pytest.approx(1e300 / math.sqrt(12))
    assert mean_estimate(torch.full((5,), 2.0)).stderr == 0.0


@pytest.mark.statistical
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("which", ["kl", "reverse_kl", "js", "hellinger", "pearson", "tv", "le_cam"])
def test_values_from_the_exact_ratio(which, both):
    x_p, x_q = draw(40_000, 3), draw(40_000, 4, 0.0, 1.0)
    estimate = divergence_from_ratio(which, log_r, x_q, x_p if both else None)
    assert estimate.n == 80_000 if both else 40_000
    assert estimate.value == pytest.approx(exact(which), abs=4 * estimate.stderr)
    assert estimate.stderr < 0.05 * exact(which) + 0.02


@pytest.mark.slow
@pytest.mark.statistical
def test_error_bars_cover_the_truth():
    """200 repetitions with the exact ratio; 90% to 99% are 2.6 sigma of the binomial around 95%."""
    names = ("kl", "js", "hellinger")
    hits = dict.fromkeys([*((n, b) for n in names for b in (0, 1)), "q", "p", "balance"], 0)
    for seed in range(200):
        x_p, x_q = draw(400, 1000 + seed), draw(400, 5000 + seed, 0.0, 1.0)
        for name in names:
            hits[name, 0] += covers(divergence_from_ratio(name, log_r, x_q), exact_value(name))
            hits[name, 1] += covers(divergence_from_ratio(name, log_r, x_q, x_p), exact_value(name))
        mass = mass_tests(log_r(x_p), log_r(x_q))
        hits["q"] += covers(mass.q, 1.0)
        hits["p"] += covers(mass.p, 1.0)
        hits["balance"] += covers(mass.balance, 0.0)
    assert all(180 <= count <= 198 for count in hits.values()), hits


VALUES: dict[str, float] = {}


def exact_value(name):
    return VALUES.setdefault(name, exact(name))


@pytest.mark.statistical
def test_error_bars_of_a_fitted_ratio_cover_the_truth():
    """The bound that uses both samples misses the truth only by the square of the error of the ratio."""
    hits = 0
    for seed in range(100):
        fit = fit_ratio(draw(2000, seed), draw(2000, 300 + seed, 0.0, 1.0), model="quadratic")
        x_p, x_q = draw(500, 600 + seed), draw(500, 900 + seed, 0.0, 1.0)
        hits += covers(divergence_from_ratio("kl", fit, x_q, x_p), exact_value("kl"))
    assert 88 <= hits <= 100


def test_a_fitted_ratio_gives_no_error_bar_from_one_sample():
    fit = fit_ratio(draw(500, 1), draw(500, 2, 0.0, 1.0), "kliep")
    assert math.isnan(divergence_from_ratio("kl", fit, draw(500, 3, 0.0, 1.0)).stderr)
    assert divergence_from_ratio("kl", fit, draw(500, 3, 0.0, 1.0), draw(500, 4)).stderr > 0


@pytest.mark.statistical
def test_a_wrong_ratio_only_lowers_the_value_from_two_samples():
    x_p, x_q = draw(40_000, 3), draw(40_000, 4, 0.0, 1.0)
    for wrong in WRONG.values():
        for which in ("kl", "js", "hellinger", "pearson"):
            estimate = divergence_from_ratio(which, wrong, x_q, x_p)
            assert estimate.value < exact_value(which) + 4 * estimate.stderr


def test_a_divergence_beyond_the_log_of_the_sample_size_is_not_trusted():
    far = 6.0

    def ratio(x):
        return (far * x - far**2 / 2).sum(1)

    x_p, x_q = draw(1000, 1, far, 1.0), draw(1000, 2, 0.0, 1.0)
    assert not divergence_from_ratio("kl", ratio, x_q).reliable
    assert "do not cover" in divergence_from_ratio("kl", ratio, x_q, x_p).warning
    assert "do not cover" in divergence_from_ratio("reverse_kl", lambda x: -ratio(x), x_p, x_q).warning
    bounded = divergence_from_ratio("js", ratio, x_q, x_p)
    assert "reach" not in (bounded.warning or "")  # it does warn of skewness: nearly all values are log 2
    assert bounded.value == pytest.approx(math.log(2), abs=0.02)


def test_a_ratio_whose_mean_is_not_one_is_not_exact():
    x_q = draw(4000, 1, 0.0, 1.0)
    assert divergence_from_ratio("js", log_r, x_q).reliable
    found = divergence_from_ratio("js", lambda x: log_r(x) + 0.3, x_q)
    assert "instead of 1" in found.warning


def test_warnings_of_the_ratio_go_with_the_value():
    fit = fit_ratio(draw(300, 1, 8.0), draw(300, 2, 0.0, 1.0), model="linear")
    assert fit.warnings
    assert (
        fit.warnings[0] in divergence_from_ratio("js", fit, draw(300, 3, 0.0, 1.0), draw(300, 4, 8.0)).warning
    )


def test_bad_input():
    with pytest.raises(UserError, match="x_q"):
        divergence_from_ratio("kl", log_r, draw(1, 1))
    with pytest.raises(UserError, match="x_p"):
        divergence_from_ratio("kl", log_r, draw(9, 1), draw(9, 1).long())
    with pytest.raises(UserError, match="does not return"):
        divergence_from_ratio("kl", lambda x: x, draw(9, 1))
    with pytest.raises(UserError, match="NaN"):
        divergence_from_ratio("kl", lambda x: log_r(x) * math.nan, draw(9, 1))
