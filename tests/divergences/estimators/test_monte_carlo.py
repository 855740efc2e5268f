"""Monte Carlo estimators, KL terms and the Estimate they return.

Most tests are exact: p = counts / K on N atoms and q uniform, and each atom occurs among the samples of p and
of q as often as its probability says, so that means over samples are expectations.
"""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.divergences import NAMES, custom, divergence
from distmatch.divergences.estimators import (
    effective_number,
    kl_estimate,
    kl_terms,
    monte_carlo,
    monte_carlo_two_sided,
    renyi_monte_carlo,
)

COUNTS = np.array([1, 2, 3, 3, 4, 5, 6, 1, 2, 3])
P = COUNTS / COUNTS.sum()
Q = np.full(10, 0.1)
LOG_P, LOG_Q = torch.tensor(np.log(P)), torch.tensor(np.log(Q))
AT_P = torch.tensor(np.repeat(np.arange(10), COUNTS))

# Textbook generators, written in r and not centered: independent of the package's formulas.
TEXTBOOK = {
    "reverse_kl": lambda r: -np.log(r),
    "kl": lambda r: r * np.log(r),
    "js": lambda r: 0.5 * (r * np.log(r) - (r + 1) * np.log((r + 1) / 2)),
    "jeffreys": lambda r: (r - 1) * np.log(r),
    "hellinger": lambda r: (np.sqrt(r) - 1) ** 2,
    "softened_reverse_kl": lambda r: (r + 1) * np.log((r + 1) / (2 * r)),
    "softened_kl": lambda r: (r + 1) * np.log((r + 1) / 2),
    "pearson": lambda r: (r - 1) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / r,
    "le_cam": lambda r: (r - 1) ** 2 / (r + 1),
    "tv": lambda r: 0.5 * np.abs(r - 1),
    "gjs:0.3": lambda r: 0.3 * r * np.log(r) - (0.3 * r + 0.7) * np.log(0.3 * r + 0.7),
    "skew_kl:0.1": lambda r: r * np.log(r / (0.1 * r + 0.9)),
    "alpha:0.3": lambda r: (r**0.3 - 0.3 * r - 0.7) / (0.3 * -0.7),
}


def exact(name: str) -> float:
    return float(np.sum(Q * TEXTBOOK[name](P / Q)))


# --- the result ------------------------------------------------------------------------------------------


def test_an_estimate_has_three_keys_and_a_warning_only_where_there_is_one():
    assert Estimate(1.0, 0.1, 9).to_dict() == {"value": 1.0, "stderr": 0.1, "n": 9}
    assert Estimate(math.inf, math.nan, 9).to_dict() == {"value": None, "stderr": None, "n": 9}
    warned = Estimate(1.0, 0.1, 9, "few samples")
    assert warned.to_dict() == {"value": 1.0, "stderr": 0.1, "n": 9, "warning": "few samples"}
    assert Estimate(1.0, 0.1, 9).reliable
    assert Estimate(math.inf, math.nan, 9).reliable
    assert not warned.reliable
    assert not Estimate(math.nan, 0.1, 9).reliable
    assert str(Estimate(1.0, 0.1, 9)) == "1 ± 0.1 (n=9)"
    assert "few samples" in str(warned)


# --- values ----------------------------------------------------------------------------------------------


def test_every_name_is_tested():
    assert {"reverse_kl", "kl", "js", "tv"} <= set(NAMES)
    assert set(NAMES) <= set(TEXTBOOK)


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("method", ["plain", "control_variate", "self_normalized"])
def test_values_are_expectations(name, method):
    found = monte_carlo(name, LOG_P, LOG_Q, method=method)
    assert found.value == pytest.approx(exact(name), rel=1e-9)
    assert found.n == 10


@pytest.mark.parametrize("name", TEXTBOOK)
def test_the_two_sided_value_is_the_sum_over_both_halves(name):
    found = monte_carlo_two_sided(name, (LOG_P, LOG_Q), (LOG_P[AT_P], LOG_Q[AT_P]))
    assert found.value == pytest.approx(exact(name), rel=1e-9)


def test_kl_and_js_agree_with_scipy():
    assert monte_carlo("kl", LOG_P, LOG_Q).value == pytest.approx(rel_entr(P, Q).sum(), rel=1e-9)
    assert monte_carlo("reverse_kl", LOG_P, LOG_Q).value == pytest.approx(rel_entr(Q, P).sum(), rel=1e-9)
    assert monte_carlo("js", LOG_P, LOG_Q).value == pytest.approx(jensenshannon(P, Q) ** 2, rel=1e-9)


@pytest.mark.parametrize("order", [0.3, 1.0, 1.0 + 1e-5, 2.0, 5.0])
@pytest.mark.parametrize("method", ["plain", "control_variate", "self_normalized"])
def test_renyi_is_the_textbook_sum(order, method):
    kl = float(rel_entr(P, Q).sum())
    if abs(order - 1) < 1e-3:  # d R / d order at 1 is half the variance of log r under p: 2e-6 here
        expected, tolerance = kl, 1e-5
    else:
        expected, tolerance = math.log(np.sum(P**order * Q ** (1 - order))) / (order - 1), 1e-9
    assert renyi_monte_carlo(order, LOG_P, LOG_Q, method=method).value == pytest.approx(
        expected, rel=tolerance
    )


def test_a_custom_divergence_works_as_well():
    own = custom(lambda r: r * torch.log(r), name="own")
    assert monte_carlo(own, LOG_P, LOG_Q).value == pytest.approx(exact("kl"), rel=1e-9)


@pytest.mark.parametrize("name", ["kl", "js", "neyman"])
def test_self_normalized_takes_densities_up_to_constants(name):
    found = monte_carlo(name, LOG_P + 7.0, LOG_Q - 40.0, method="self_normalized")
    assert found.value == pytest.approx(exact(name), rel=1e-9)
    shifted = renyi_monte_carlo(2.0, LOG_P + 7.0, LOG_Q, method="self_normalized")
    assert shifted.value == pytest.approx(math.log(np.sum(P * P / Q)), rel=1e-9)
    assert monte_carlo("renyi:2", LOG_P, LOG_Q) == renyi_monte_carlo(2.0, LOG_P, LOG_Q)


def normal(x: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


def draw(n: int, seed: int = 0, **kw) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **kw)


def test_the_effective_sample_size_is_reported():
    r = P / Q
    expected = r.sum() ** 2 / (r**2).sum()
    assert monte_carlo("kl", LOG_P + 5, LOG_Q, method="self_normalized").ess == pytest.approx(expected)
    assert effective_number(torch.tensor([1e300, 1e300, 0.0], dtype=torch.float64)) == pytest.approx(2.0)


def test_equal_distributions_are_at_distance_zero_without_error():
    for method in ("plain", "control_variate", "self_normalized"):
        found = monte_carlo("js", LOG_Q, LOG_Q, method=method)
        assert (found.value, found.stderr, found.ess) == (0.0, 0.0, pytest.approx(10.0))
        assert found.reliable


# --- limits and warnings ---------------------------------------------------------------------------------


def test_mass_of_q_outside_p_is_infinite_or_counted():
    log_p = torch.tensor([math.log(2.0), -math.inf], dtype=torch.float64)  # p uniform on half of q's support
    log_q = torch.zeros(2, dtype=torch.float64)
    for name in ("reverse_kl", "neyman", "jeffreys", "softened_reverse_kl", "alpha:-0.05"):
        found = monte_carlo(name, log_p, log_q)
        assert found.value == math.inf
        assert math.isnan(found.stderr)
    assert monte_carlo("kl", log_p, log_q).value == pytest.approx(math.log(2))
    assert monte_carlo("tv", log_p, log_q).value == pytest.approx(0.5)
    assert monte_carlo("alpha:0.01", log_p, log_q).value == pytest.approx((0.5 * 2**0.01 - 1) / -0.0099)
    assert renyi_monte_carlo(0.5, log_p, log_q).value == pytest.approx(math.log(2))


@pytest.mark.parametrize(("name", "bound"), [("js", math.log(2)), ("tv", 1.0), ("hellinger", 2.0)])
def test_disjoint_supports_reach_the_upper_bound(name, bound):
    empty, full = torch.full((5,), -math.inf), torch.zeros(5)
    found = monte_carlo_two_sided(name, (empty, full), (full, empty))
    assert found.value == pytest.approx(bound, rel=1e-12)
    assert divergence(name).upper_bound == pytest.approx(bound)
    assert monte_carlo_two_sided("kl", (empty, full), (full, empty)).value == math.inf


def k3_scatter(x, shift):
    """The naive error of k3, as if its terms had no tail."""
    terms = kl_terms(normal(x, shift), normal(x), "k3")
    return float(terms.std()) / math.sqrt(len(x))


def test_samples_of_q_that_cannot_see_p_are_reported():
    x = draw(2000)
    far = monte_carlo("kl", normal(x, 6.0), normal(x))
    assert not far.reliable
    assert far.ess < 20
    assert (
        "effective sample size"
        in monte_carlo("kl", normal(x, 6), normal(x), method="self_normalized").warning
    )
    # k3 = k1 + (r - 1) misses the whole mean of r here: it would be too low by 1 with a tiny error.
    k3 = kl_estimate(normal(x, 6.0), normal(x), "k3")
    assert abs(k3.value - 18.0) > 5 * k3_scatter(x, 6.0)
    assert "not 1" in k3.warning
    assert kl_estimate(normal(x, 6.0), normal(x), "k1").reliable
    unnormalized = monte_carlo("js", normal(x, 0.5) + 1.0, normal(x))
    assert "not 1" in unnormalized.warning
    assert monte_carlo("js", normal(x, 0.5), normal(x)).reliable


@pytest.mark.parametrize(
    ("log_p", "log_q", "word"),
    [
        (torch.tensor([0.0, math.nan]), torch.zeros(2), "not a log-density"),
        (torch.tensor([0.0, math.inf]), torch.zeros(2), "not a log-density"),
        (torch.zeros(2), torch.tensor([0.0, -math.inf]), "not a log-density"),
        (torch.zeros(3), torch.zeros(2), "length"),
        (torch.zeros(1), torch.zeros(1), "one value per sample"),
        (torch.zeros(0), torch.zeros(0), "one value per sample"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "one value per sample"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), "floating-point"),
        ([0.0, 0.0], torch.zeros(2), "tensor"),
    ],
)
def test_log_densities_with_holes_are_refused(log_p, log_q, word):
    for estimator in (monte_carlo, lambda _, p, q: renyi_monte_carlo(2.0, p, q)):
        with pytest.raises(UserError, match=word):
            estimator("kl", log_p, log_q)
    with pytest.raises(UserError, match=word):
        kl_estimate(log_p, log_q)


def test_unknown_methods_orders_and_names_are_refused():
    with pytest.raises(UserError, match="unknown method"):
        monte_carlo("kl", LOG_P, LOG_Q, method="best")
    with pytest.raises(UserError, match="unknown divergence"):
        monte_carlo("kll", LOG_P, LOG_Q)
    with pytest.raises(UserError, match="order"):
        renyi_monte_carlo(0.0, LOG_P, LOG_Q)
    with pytest.raises(UserError, match="KL term"):
        kl_terms(LOG_P, LOG_Q, "k4")
    nowhere = torch.full((4,), -math.inf)
    with pytest.raises(UserError, match="vanishes"):
        monte_carlo("kl", nowhere, torch.zeros(4), method="self_normalized")
    with pytest.raises(UserError, match="vanishes"):
        renyi_monte_carlo(2.0, nowhere, torch.zeros(4))


# --- k1, k2, k3 ------------------------------------------------------------------------------------------


def test_values_of_the_kl_terms():
    truth = float(rel_entr(Q, P).sum())
    for term in ("k1", "k3"):
        assert kl_estimate(LOG_P, LOG_Q, term).value == pytest.approx(truth, rel=1e-9)
    assert kl_estimate(LOG_P, LOG_Q, "k2").value == pytest.approx(float(np.mean(np.log(P / Q) ** 2) / 2))
    assert math.isnan(kl_estimate(LOG_P, LOG_Q, "k2").stderr)
    x = draw(5000)
    assert "biased" in kl_estimate(normal(x, 1.0), normal(x), "k2").warning
    assert bool((kl_terms(normal(x, 1.0), normal(x), "k3") >= 0).all())


def test_gradients_of_the_kl_terms_at_fixed_samples():
    """Exact expectations over the atoms of a softmax: k1 none, k2 that of KL(q||p), k3 that of KL(p||q)."""
    theta = draw(6, seed=1).requires_grad_()
    log_p = torch.log_softmax(draw(6, seed=2), 0)

    def gradient(loss):
        return torch.autograd.grad(loss, theta)[0]

    log_q = torch.log_softmax(theta, 0)
    reverse = gradient((log_q.exp() * (log_q - log_p)).sum())
    log_q = torch.log_softmax(theta, 0)
    forward = gradient((log_p.exp() * (log_p - log_q)).sum())

    def of_term(term):
        log_q = torch.log_softmax(theta, 0)
        return gradient((log_q.detach().exp() * kl_terms(log_p, log_q, term)).sum())

    assert torch.allclose(of_term("k1"), torch.zeros(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(of_term("k2"), reverse, atol=1e-12)
    assert torch.allclose(of_term("k3"), forward, atol=1e-12)
    assert not torch.allclose(reverse, forward, atol=1e-2)


def test_gradients_of_the_kl_terms_through_reparametrized_samples():
    """x = m + s z, expectations by Gauss-Hermite: k1 and k3 have the gradient of KL(q||p), k2 does not."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, w = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    parameters = torch.tensor([0.4, 0.8], dtype=torch.float64, requires_grad=True)
    m, s = parameters.detach()
    # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s.
    truth = torch.stack([m, s - 1 / s])
    found = {}
    for term in ("k1", "k2", "k3"):
        x = parameters[0] + parameters[1] * z
        log_q = normal((x - parameters[0]) / parameters[1]) - torch.log(parameters[1])
        loss = (w * kl_terms(normal(x), log_q, term)).sum()
        found[term] = torch.autograd.grad(loss, parameters)[0]
    assert torch.allclose(found["k1"], truth, atol=1e-10)
    assert torch.allclose(found["k3"], truth, atol=1e-10)
    assert not torch.allclose(found["k2"], truth, atol=1e-2)
