"""What each method of fitting a ratio claims of itself: its equations, other packages, brute force."""

import math

import pytest
import torch
from scipy.spatial import KDTree
from sklearn.linear_model import LogisticRegression

from distmatch.ratio import fit_ratio
from distmatch.ratio.calibration import calibrate
from distmatch.ratio.kernels import log_kernel
from distmatch.ratio.kliep import mixture_weights, scaled_log_kernels
from distmatch.ratio.least_squares import leave_one_out, solve
from distmatch.ratio.logistic import fit_regression
from distmatch.ratio.neighbors import fit_neighbors
from tests.reference.ratio_samples import draw, truth


def test_linear_regression_agrees_with_scikit_learn():
    p, q = draw(300, 3, 1), draw(200, 3, 2, 0.0, 1.0)
    mine = fit_regression(p, q, "linear")
    both = torch.cat([p, q])
    mean, std = both.mean(0), both.std(0, correction=0)
    z = ((both - mean) / std).numpy()
    label = [1] * len(p) + [0] * len(q)
    # our penalty per weight is 1 / (2 * 100); scikit-learn's is 1 / (2 C)
    peer = LogisticRegression(C=100.0, tol=1e-12, max_iter=1000).fit(z, label)
    expected = torch.as_tensor(peer.decision_function(z)) - math.log(len(p) / len(q))
    torch.testing.assert_close(mine(both), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize(("n", "m"), [(14, 14), (11, 17), (17, 11)])
def test_leave_one_out_equals_brute_force_refits(alpha, n, m):
    p, q = draw(n, 2, 1), draw(m, 2, 2, 0.0, 1.0)
    centers, width, ridges = p[:6], 0.9, [1e-3, 0.1]
    fast = leave_one_out(p, q, centers, width, ridges, alpha)
    for ridge, values in zip(ridges, fast, strict=True):
        losses = []
        for i in range(min(n, m)):
            rest_p, rest_q = torch.cat([p[:i], p[i + 1 :]]), torch.cat([q[:i], q[i + 1 :]])
            theta = solve(rest_p, rest_q, centers, width, ridge, alpha)
            r_p, r_q = (log_kernel(x[i : i + 1], centers, width).exp() @ theta for x in (p, q))
            losses.append(0.5 * alpha * r_p**2 + 0.5 * (1 - alpha) * r_q**2 - r_p)
        torch.testing.assert_close(values, torch.cat(losses), rtol=1e-8, atol=1e-10)


def test_least_squares_solves_its_normal_equations():
    p, q = draw(60, 2, 1), draw(50, 2, 2, 0.0, 1.0)
    phi_p, phi_q = (log_kernel(x, p[:5], 1.0).exp() for x in (p, q))
    theta = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
    loss = (
        0.5 * 0.2 * (phi_p @ theta).square().mean()
        + 0.5 * 0.8 * (phi_q @ theta).square().mean()
        - (phi_p @ theta).mean()
        + 0.5 * 0.1 * theta.square().sum()
    )
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])
    best = theta.detach() - torch.linalg.solve(hessian, gradient.detach())  # the loss is quadratic
    torch.testing.assert_close(solve(p, q, p[:5], 1.0, 0.1, 0.2), best.clamp_min(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_least_squares_agrees_with_densratio(alpha):
    densratio = pytest.importorskip("densratio")  # same kernels, loss, ridge and clipping
    p, q = draw(150, 2, 1), draw(120, 2, 2, 0.0, 1.0)
    settings = {"sigma_range": [0.8], "lambda_range": [0.05], "kernel_num": 20, "verbose": False}
    peer = densratio.densratio(p.numpy(), q.numpy(), method="RuLSIF", alpha=alpha, **settings)
    centers = torch.as_tensor(peer.kernel_info.centers)
    x = draw(50, 2, 3)
    mine = log_kernel(x, centers, 0.8).exp() @ solve(p, q, centers, 0.8, 0.05, alpha)
    torch.testing.assert_close(
        mine, torch.as_tensor(peer.compute_density_ratio(x.numpy())), rtol=1e-6, atol=0
    )


def test_kliep_reaches_at_least_the_likelihood_of_densratio():
    densratio = pytest.importorskip("densratio")  # projected gradient ascent; the problem is concave
    p, q = draw(150, 2, 1), draw(120, 2, 2, 0.0, 1.0)
    peer = densratio.densratio(
        p.numpy(), q.numpy(), method="KLIEP", sigma=[0.8], kernel_num=20, verbose=False
    )
    centers = torch.as_tensor(peer.kernel_info.centers)
    log_w, gap = mixture_weights(scaled_log_kernels(p, q, centers, 0.8), tolerance=1e-5, most=20_000)
    mine = torch.logsumexp(scaled_log_kernels(p, q, centers, 0.8) + log_w, 1)
    on_p, on_q = (torch.as_tensor(peer.compute_density_ratio(x.numpy())) for x in (p, q))
    theirs = on_p / on_q.mean()  # the constraint E_q[r] = 1, exactly
    assert mine.mean() >= theirs.log().mean() - gap


def test_the_relative_ratio_is_converted_and_says_where_it_cannot_be():
    p, q = draw(1000, 1, 1), draw(1000, 1, 2, 0.0, 1.0)
    ratio = fit_ratio(p, q, "rulsif", alpha=0.4)
    x = draw(500, 1, 3)
    assert ratio.relative == 0.4
    relative, plain = ratio.relative_log_ratio(x), ratio.log_ratio(x)
    inside = relative < math.log(0.99 / 0.4)
    assert inside.any()
    again = plain - torch.log(0.4 * plain.exp() + 0.6)
    torch.testing.assert_close(again[inside], relative[inside])
    exact = truth(x) - torch.log(0.4 * truth(x).exp() + 0.6)
    assert (relative - exact).square().mean().sqrt() < 0.2
    far = fit_ratio(p + 4.0, q, "rulsif", alpha=0.4)
    assert any("bound 1/alpha" in w for w in far.warnings)
    assert far.log_ratio(p + 4.0).isfinite().all()


def test_kliep_reaches_its_optimum_and_its_constraint():
    p, q = draw(200, 1, 1), draw(150, 1, 2, 0.0, 1.0)
    centers = p[:12]
    terms = scaled_log_kernels(p, q, centers, 0.6)
    log_w, gap = mixture_weights(terms, tolerance=1e-6, most=100_000)
    assert gap <= 1e-6
    assert log_w.exp().sum().item() == pytest.approx(1.0)
    reached = torch.logsumexp(terms + log_w, 1).mean()
    free = log_w.clone().requires_grad_(True)  # the same optimum by an independent route
    optimizer = torch.optim.LBFGS([free], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -torch.logsumexp(terms + free.log_softmax(0), 1).mean()
        value.backward()
        return value

    with torch.no_grad():
        free.zero_()
    optimizer.step(loss)
    assert -loss().item() == pytest.approx(reached.item(), abs=2e-6)
    mass = torch.logsumexp(scaled_log_kernels(q, q, centers, 0.6) + log_w, 1).exp().mean()
    assert mass.item() == pytest.approx(1.0, rel=1e-9)


def test_neighbors_equal_their_definition():
    p, q, x = draw(60, 3, 1), draw(40, 3, 2, 0.0, 1.0), draw(25, 3, 3)
    to_p, to_q = (torch.as_tensor(KDTree(y.numpy()).query(x.numpy(), k=4)[0][:, 3]) for y in (p, q))
    expected = 3 * (to_q.log() - to_p.log()) + math.log(40 / 60)
    fitted = fit_neighbors(p, q, 4)
    torch.testing.assert_close(fitted.log_r(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["platt", "temperature", "isotonic"])
def test_calibration_undoes_a_distortion(kind):
    p, q = draw(4000, 1, 1), draw(2000, 1, 2, 0.0, 1.0)
    offset = 0.0 if kind == "temperature" else 0.5
    fixed, _ = calibrate(kind, 3 * truth(p) + offset, 3 * truth(q) + offset)
    x = draw(2000, 1, 3)
    # the ends of an isotonic fit are cut off, so the middle of the errors is compared
    assert (fixed(3 * truth(x) + offset) - truth(x)).abs().median() < (0.2 if kind == "isotonic" else 0.1)


def test_a_platt_calibrated_ratio_is_balanced_on_the_calibration_samples():
    p, q = draw(300, 1, 1), draw(200, 1, 2, 0.0, 1.0)
    fixed, _ = calibrate("platt", 2 * truth(p), 2 * truth(q))
    prior = math.log(300 / 200)
    chance = torch.sigmoid(torch.cat([fixed(2 * truth(p)), fixed(2 * truth(q))]) + prior)
    assert chance.sum().item() == pytest.approx(300 * 301 / 302 + 200 / 202, rel=1e-9)


def test_telescoping_beats_one_classifier_on_distributions_far_apart():
    shift = math.sqrt(40.0)  # KL = 20 nats
    p, q = draw(2000, 1, 1, shift, 1.0), draw(2000, 1, 2, 0.0, 1.0)
    x = torch.cat([draw(500, 1, 3, shift, 1.0), draw(500, 1, 4, 0.0, 1.0)])
    for model in ("linear", "quadratic"):
        one = fit_ratio(p, q, "classifier", model=model)
        chain = fit_ratio(p, q, "telescoping", model=model)
        single, telescoped = (
            (r.log_ratio(x) - truth(x, shift, 1.0)).square().mean().sqrt().item() for r in (one, chain)
        )
        assert any("separates the samples" in w for w in one.warnings)
        assert chain.chosen["bridges"] > 3
        assert telescoped < 0.8 * single, model
    kl = fit_ratio(p, q, "telescoping", model="linear").log_ratio(draw(1000, 1, 5, shift, 1.0)).mean()
    assert kl.item() == pytest.approx(20.0, abs=2.0)


def test_telescoping_spans_scales_a_million_times_apart():
    p, q = draw(4000, 1, 1, 0.0, 1e-6), draw(4000, 1, 2, 0.0, 1.0)
    chain = fit_ratio(p, q, "telescoping", model="quadratic")
    assert chain.chosen["bridges"] > 10
    kl = chain.log_ratio(draw(1000, 1, 3, 0.0, 1e-6)).mean()  # log 1e6 - 1/2
    assert kl.item() == pytest.approx(math.log(1e6) - 0.5, abs=1.5)  # spread over seeds 0.4


def test_a_chain_of_one_bridge_is_the_classifier():
    p, q = draw(400, 2, 1), draw(400, 2, 2, 0.0, 1.0)
    x = draw(100, 2, 3)
    one = fit_ratio(p, q, "classifier", model="quadratic")
    chain = fit_ratio(p, q, "telescoping", model="quadratic", bridges=1)
    torch.testing.assert_close(chain.log_ratio(x), one.log_ratio(x), rtol=1e-8, atol=1e-8)
