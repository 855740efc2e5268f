"""Laws of noise levels: at which levels student and teacher are compared, and the fake score learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from distmatch.base.errors import UserError
from distmatch.diffusion.noise import Karras, LogNormal, Truncated
from distmatch.methods.matching import loop
from distmatch.nets.ema import ema_decay
from tests.helpers.small import batch, distiller, network_teacher

LOW, HIGH = 0.05, 3.0


def cut(mean: float, std: float, low: float, high: float) -> Any:
    """scipy's law of log sigma between two levels."""
    ends = [(math.log(end) - mean) / std for end in (low, high)]
    return stats.truncnorm(*ends, loc=mean, scale=std)


def test_a_log_normal_between_two_levels_is_that_of_scipy() -> None:
    law, theirs = Truncated(LogNormal(-1.2, 1.2), LOW, HIGH), cut(-1.2, 1.2, LOW, HIGH)
    u = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    sigma = law.quantile(u)
    torch.testing.assert_close(sigma.log(), torch.from_numpy(theirs.ppf(u.numpy())), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(law.cdf(sigma), u, rtol=1e-8, atol=1e-9)
    assert law.quantile(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([LOW, HIGH])
    assert law.cdf(torch.tensor([LOW / 2, 2 * HIGH])).tolist() == [0, 1]
    with pytest.raises(UserError, match="almost no mass"):
        Truncated(LogNormal(20.0, 1.0), LOW, HIGH)


def levels_seen(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels that student and fake score are given in 30 steps of 200, in units of sigma_data."""
    seen: dict[str, list[torch.Tensor]] = {"student": [], "critic": []}
    generator, fake_score = loop.generator_gradient, loop.fake_score_backward

    def recorded_generator(method: Any, state: Any, x0: Any, sigma: Any, *rest: Any) -> Any:
        seen["student"].append(sigma)
        return generator(method, state, x0, sigma, *rest)

    def recorded_fake_score(method: Any, state: Any, x0: Any, sigma: Any, *rest: Any) -> Any:
        seen["critic"].append(sigma)
        return fake_score(method, state, x0, sigma, *rest)

    monkeypatch.setattr(loop, "generator_gradient", recorded_generator)
    monkeypatch.setattr(loop, "fake_score_backward", recorded_fake_score)
    method = distiller(network_teacher(), method="sid", fake_score_steps=1, **settings)
    state = method.init(0)
    for step in range(30):
        method.step(state, batch(step, n=200))
    student, other = (torch.cat(values) / 0.7 for values in seen.values())
    return student.double(), other.double()


def test_the_fake_score_learns_at_levels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """SiD: the comparison even in sigma^(1/7) up to one level, the fake score as in EDM's training. Seed 0;
    Kolmogorov-Smirnov at 6000 levels, bound 1.95 / sqrt(n), which one law in a thousand exceeds.
    """
    student, critic = levels_seen(
        monkeypatch,
        noise_low=0.01,
        noise_high=10.0,
        fake_score_distribution="log-normal",
        noise_mean=-0.5,
        noise_std=1.2,
    )
    bound = 1.95 / len(student) ** 0.5
    even = (student.clamp_min(1e-9) ** (1 / 7) - 0.01 ** (1 / 7)) / (10 ** (1 / 7) - 0.01 ** (1 / 7))
    assert stats.kstest(even.numpy(), "uniform").statistic < bound
    ends = [end / 0.7 for end in (network_teacher().sigma_min, network_teacher().sigma_max)]
    theirs = cut(-0.5, 1.2, *ends)
    assert stats.kstest(critic.log().numpy(), theirs.cdf).statistic < bound
    assert stats.kstest(student.log().numpy(), theirs.cdf).statistic > 5 * bound


def test_both_can_have_a_log_normal_between_the_ends_of_the_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Diff-Instruct. Seed 0, bound as above."""
    student, critic = levels_seen(
        monkeypatch,
        noise_distribution="log-normal",
        noise_mean=0.2,
        noise_std=0.7,
        noise_low=0.1,
        noise_high=4.0,
    )
    for levels in (student, critic):
        statistic = stats.kstest(levels.log().numpy(), cut(0.2, 0.7, 0.1, 4.0).cdf).statistic
        assert statistic < 1.95 / len(levels) ** 0.5


def test_bins_of_the_ratio_have_equal_probability_under_the_law_of_the_comparison() -> None:
    method = distiller(
        network_teacher(), "kl", noise_distribution="log-normal", noise_mean=0.0, noise_std=1.0, ratio_bins=5
    )
    borders = torch.tensor(method.notes()["sigma_bins"], dtype=torch.float64)
    theirs = cut(math.log(0.7), 1.0, float(borders[0]), float(borders[-1]))
    assert theirs.cdf(borders.log().numpy()) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], abs=1e-6)


def test_without_a_choice_both_are_as_they_were() -> None:
    method = distiller(network_teacher(), method="sid")
    assert method.noise == method.fake_score_noise == Karras(*method.context.compared_sigmas, 7.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"noise_mean": 0.3},
            "--noise-mean does nothing with --noise-distribution auto and --fake-score-distribution same",
        ),
        ({"noise_std": 0.3}, "--noise-std does nothing"),
        (
            {"noise_distribution": "log-normal", "noise_rho": 3.0},
            "--noise-rho does nothing with --noise-distribution log-normal",
        ),
        ({"fake_score_distribution": "log-normal", "noise_mean": 30.0}, "almost no mass"),
    ],
)
def test_settings_of_a_law_that_is_not_in_use_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        distiller(network_teacher(), method="sid", **settings)


def test_a_half_life_of_zero_keeps_the_last_weights() -> None:
    assert ema_decay(7, half_life=0.0) == 0
    method = distiller(network_teacher(), method="sid", fake_score_steps=1, ema_half_life=0.0)
    state = method.init(0)
    for step in range(3):
        method.step(state, batch(step))
    pairs = zip(state.ema.module.parameters(), state.student.denoiser.parameters(), strict=True)
    assert all(torch.equal(mean, own) for mean, own in pairs)
