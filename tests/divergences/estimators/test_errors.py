"""Standard errors of the Monte Carlo estimators against the jackknife, term by term."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from distmatch.divergences.estimators import monte_carlo, renyi_monte_carlo
from distmatch.divergences.estimators.results import mass_warning, mean_error
from distmatch.divergences.estimators.tails import both_tails

# Generators in r, not centered: independent of the package's formulas.
TEXTBOOK = {
    "js": lambda r: 0.5 * (r * np.log(r) - (r + 1) * np.log((r + 1) / 2)),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


def normal(x: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def draw(n: int, seed: int = 0, **kw) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **kw)


def test_the_control_variate_is_the_regression_on_r():
    x = draw(300)
    log_p, log_q = normal(x, 0.7), normal(x)
    r = np.exp((log_p - log_q).numpy())
    design = np.stack([np.ones(300), r - 1], 1)
    y = TEXTBOOK["js"](r)

    def intercept(keep):
        return np.linalg.lstsq(design[keep], y[keep], rcond=None)[0][0]

    index = np.arange(300)
    left_out = np.array([intercept(index != i) for i in index])
    found = monte_carlo("js", log_p, log_q, method="control_variate")
    value, slope = np.linalg.lstsq(design, y, rcond=None)[0]
    assert found.value == pytest.approx(value, rel=1e-9)

    def residual(x):
        return torch.as_tensor(TEXTBOOK["js"](x.exp().numpy())) - slope * torch.expm1(x) - value

    tails = both_tails(log_p - log_q, residual)
    # Leaving one out of a regression has a closed form, so that only n / (n - 1) lies between the two.
    expected = math.hypot(300 / 299 * jackknife(left_out), *(t.amount for t in tails))
    assert found.stderr == pytest.approx(expected, rel=1e-6)
    assert found.stderr < monte_carlo("js", log_p, log_q, method="plain").stderr


def jackknife(left_out):
    """The jackknife's standard error, widened for skewness."""
    n = len(left_out)
    return (1 + 2 * scipy.stats.skew(left_out) ** 2 / n) * math.sqrt((n - 1) * left_out.var())


def test_the_control_variate_of_renyi_is_that_of_its_power():
    x = draw(200)
    log_p, log_q = normal(x, 0.5), normal(x)
    r = np.exp((log_p - log_q).numpy())
    design = np.stack([np.ones(200), r - 1], 1)

    def fit(keep):
        return np.linalg.lstsq(design[keep], r[keep] ** 3, rcond=None)[0]

    index = np.arange(200)
    mean, slope = fit(index >= 0)
    left_out = np.array([fit(index != i)[0] for i in index])
    found = renyi_monte_carlo(3.0, log_p, log_q, method="control_variate")
    assert found.value == pytest.approx(math.log(mean) / 2, rel=1e-9)
    tails = both_tails(log_p - log_q, lambda x: (torch.exp(3 * x) - slope * torch.expm1(x)) / mean - 1)
    expected = math.hypot(200 / 199 * jackknife(left_out) / mean, *(t.amount for t in tails)) / 2
    assert found.stderr == pytest.approx(expected, rel=1e-6)


def test_a_mean_of_the_ratio_that_is_not_one_is_noticed_beyond_five_errors():
    excess = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    error = mean_error(excess)
    assert mass_warning(excess) is None
    assert mass_warning(excess + 4.9 * error) is None
    assert "not 1" in mass_warning(excess + 6 * error)
    assert "not 1" in mass_warning(excess - 6 * error)


def influence(name, w, ws, value):
    """What one more sample of weight w adds, ws the weights at hand, from f'(r) = log(2r / (1 + r)) / 2 of JS
    and 1 - 1/r^2 of Neyman, and from log E[w^2] of Renyi."""
    if name == "renyi":
        return w**2 / (ws**2).mean() - 2 * (w - 1) - 1
    slope = {"js": 0.5 * ws * np.log(2 * ws / (1 + ws)), "neyman": ws - 1 / ws}[name].mean()
    return TEXTBOOK[name](w) - slope * (w - 1) - value


@pytest.mark.parametrize("estimate", ["js", "neyman", "renyi"])
def test_the_self_normalized_error_is_that_of_the_jackknife(estimate):
    x = draw(400)
    log_p, log_q = normal(x, 0.7) + 3.0, normal(x)

    def run(keep):
        if estimate == "renyi":
            return renyi_monte_carlo(2.0, log_p[keep], log_q[keep], method="self_normalized")
        return monte_carlo(estimate, log_p[keep], log_q[keep], method="self_normalized")

    index = torch.arange(400)
    left_out = np.array([run(index != i).value for i in range(400)])
    found = run(index >= 0)
    log_w = log_p - log_q - torch.logsumexp(log_p - log_q, 0) + math.log(400)
    ws = log_w.exp().numpy()
    tails = both_tails(
        log_w, lambda x: torch.as_tensor(influence(estimate, x.exp().numpy(), ws, found.value))
    )
    expected = math.hypot(jackknife(left_out), *(t.amount for t in tails))
    # Both are estimates of the same error that agree to O(1/n) for smooth functions of means.
    assert found.stderr == pytest.approx(expected, rel=0.03)
