"""Fitted density ratios against the known ratio of Gaussians, and against brute force."""

import math

import pytest
import torch
from scipy.spatial import KDTree
from sklearn.linear_model import LogisticRegression

from distmatch.base.errors import UserError
from distmatch.ratio import METHODS, fit_ratio
from distmatch.ratio.calibration import calibrate
from distmatch.ratio.kernels import log_kernel
from distmatch.ratio.kliep import mixture_weights, scaled_log_kernels
from distmatch.ratio.least_squares import leave_one_out, solve
from distmatch.ratio.logistic import fit_regression
from distmatch.ratio.neighbours import fit_neighbours
from distmatch.ratio.samples import LOG_LIMIT

SHIFT, SCALE = 0.7, 0.8


def draw(n, d, seed, shift=SHIFT, scale=SCALE, dtype=torch.float64):
    """n samples of N(shift, scale^2 I)."""
    g = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=g, dtype=dtype)


def truth(x, shift=SHIFT, scale=SCALE):
    """log N(shift, scale^2 I) - log N(0, I)."""
    return (-0.5 * ((x - shift) / scale) ** 2 - math.log(scale) + 0.5 * x**2).sum(1)


def error(ratio, x):
    return (ratio.log_ratio(x) - truth(x)).square().mean().sqrt().item()


def quick(method, steps=60):
    """Options that keep the network of a method short."""
    return {"steps": steps} if method in ("classifier", "telescoping") else {}


# Root mean square errors of log r at fresh samples of p and of q. The bounds are about 1.3 times the
# largest of six seeds; log r itself has a root mean square of 0.6 and 1.2 in 1-D, 0.9 and 1.9 in 2-D.
BOUNDS = {
    ("classifier", 1): (0.25, 0.45),
    ("telescoping", 1): (0.25, 0.6),
    ("ulsif", 1): (0.3, 0.45),
    ("rulsif", 1): (0.3, 0.4),
    ("kliep", 1): (0.25, 0.6),
    ("knn", 1): (0.35, 0.9),
    ("classifier", 2): (0.3, 0.55),
    ("telescoping", 2): (0.3, 0.55),
    ("ulsif", 2): (0.7, 1.2),
    ("rulsif", 2): (0.6, 1.0),
    ("kliep", 2): (0.3, 0.65),
    ("knn", 2): (0.45, 1.4),
}


@pytest.mark.parametrize(("method", "d"), BOUNDS)
def test_every_method_recovers_the_ratio_of_two_gaussians(method, d):
    ratio = fit_ratio(draw(1500, d, 1), draw(1000, d, 2, 0.0, 1.0), method, seed=1, **quick(method, 200))
    on_p, on_q = BOUNDS[method, d]
    assert error(ratio, draw(2000, d, 3)) < on_p
    assert error(ratio, draw(2000, d, 4, 0.0, 1.0)) < on_q


def test_the_prior_of_unequal_samples_is_taken_out():
    ratio = fit_ratio(draw(6000, 1, 1), draw(600, 1, 2, 0.0, 1.0), "classifier", model="quadratic")
    assert error(ratio, draw(1000, 1, 3)) < 0.2  # without the correction it is off by log 10 = 2.3


def test_a_quadratic_regression_converges_to_the_truth_as_root_n():
    errors = []
    for n in (1000, 64_000):
        ratio = fit_ratio(draw(n, 2, 5), draw(n, 2, 6, 0.0, 1.0), "classifier", model="quadratic")
        errors.append(error(ratio, draw(2000, 2, 7)))
    assert errors[1] < 0.025  # sqrt(64) = 8 times less than at n = 1000
    assert errors[1] < errors[0] / 3


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
    centres, width, ridges = p[:6], 0.9, [1e-3, 0.1]
    fast = leave_one_out(p, q, centres, width, ridges, alpha)
    for ridge, values in zip(ridges, fast, strict=True):
        losses = []
        for i in range(min(n, m)):
            rest_p, rest_q = torch.cat([p[:i], p[i + 1 :]]), torch.cat([q[:i], q[i + 1 :]])
            theta = solve(rest_p, rest_q, centres, width, ridge, alpha)
            r_p, r_q = (log_kernel(x[i : i + 1], centres, width).exp() @ theta for x in (p, q))
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
    centres = torch.as_tensor(peer.kernel_info.centers)
    x = draw(50, 2, 3)
    mine = log_kernel(x, centres, 0.8).exp() @ solve(p, q, centres, 0.8, 0.05, alpha)
    torch.testing.assert_close(
        mine, torch.as_tensor(peer.compute_density_ratio(x.numpy())), rtol=1e-6, atol=0
    )


def test_kliep_reaches_at_least_the_likelihood_of_densratio():
    densratio = pytest.importorskip("densratio")  # projected gradient ascent; the problem is concave
    p, q = draw(150, 2, 1), draw(120, 2, 2, 0.0, 1.0)
    peer = densratio.densratio(
        p.numpy(), q.numpy(), method="KLIEP", sigma=[0.8], kernel_num=20, verbose=False
    )
    centres = torch.as_tensor(peer.kernel_info.centers)
    log_w, gap = mixture_weights(scaled_log_kernels(p, q, centres, 0.8), tolerance=1e-5, most=20_000)
    mine = torch.logsumexp(scaled_log_kernels(p, q, centres, 0.8) + log_w, 1)
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
    centres = p[:12]
    terms = scaled_log_kernels(p, q, centres, 0.6)
    log_w, gap = mixture_weights(terms, tolerance=1e-6, most=100_000)
    assert gap <= 1e-6
    assert log_w.exp().sum().item() == pytest.approx(1.0)
    reached = torch.logsumexp(terms + log_w, 1).mean()
    free = log_w.clone().requires_grad_(True)  # the same optimum by an independent route
    optimiser = torch.optim.LBFGS([free], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = -torch.logsumexp(terms + free.log_softmax(0), 1).mean()
        value.backward()
        return value

    with torch.no_grad():
        free.zero_()
    optimiser.step(loss)
    assert -loss().item() == pytest.approx(reached.item(), abs=2e-6)
    mass = torch.logsumexp(scaled_log_kernels(q, q, centres, 0.6) + log_w, 1).exp().mean()
    assert mass.item() == pytest.approx(1.0, rel=1e-9)


def test_neighbours_equal_their_definition():
    p, q, x = draw(60, 3, 1), draw(40, 3, 2, 0.0, 1.0), draw(25, 3, 3)
    to_p, to_q = (torch.as_tensor(KDTree(y.numpy()).query(x.numpy(), k=4)[0][:, 3]) for y in (p, q))
    expected = 3 * (to_q.log() - to_p.log()) + math.log(40 / 60)
    fitted = fit_neighbours(p, q, 4)
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
        assert any("tells the samples apart" in w for w in one.warnings)
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


def test_the_mass_tests_are_taken_on_the_samples_held_out():
    ratio = fit_ratio(draw(500, 1, 1), draw(300, 1, 2, 0.0, 1.0), "knn", held_out=0.2)
    assert (ratio.mass.q.n, ratio.mass.p.n) == (60, 100)
    assert ratio.mass.balance.n == 160


def test_equal_distributions_have_ratio_one():
    p, q = draw(1500, 2, 1), draw(1500, 2, 2)
    for method in METHODS:
        log_r = fit_ratio(p, q, method, **quick(method)).log_ratio(draw(500, 2, 3))
        assert log_r.square().mean().sqrt() < 0.35, method


@pytest.mark.parametrize("method", METHODS)
def test_gradients_with_respect_to_the_points(method):
    ratio = fit_ratio(draw(200, 2, 1), draw(200, 2, 2, 0.0, 1.0), method, **quick(method))
    x = draw(5, 2, 3).requires_grad_(True)
    assert torch.autograd.gradcheck(ratio.log_ratio, (x,))
    assert torch.autograd.gradcheck(ratio.ratio, (x,))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_ratio_in_the_dtype_of_the_points(method):
    p, q = draw(120, 2, 1), draw(100, 2, 2, 0.0, 1.0)
    first, second = (fit_ratio(p, q, method, seed=3, **quick(method)) for _ in range(2))
    x = draw(20, 2, 3)
    assert torch.equal(first.log_ratio(x), second.log_ratio(x))
    assert first.log_ratio(x).dtype == torch.float64
    assert first.log_ratio(x.float()).dtype == torch.float32
    assert first.log_ratio(x.bfloat16()).dtype == torch.float32
    far = first.log_ratio(1e6 * x)
    assert far.isfinite().all()
    assert far.abs().max() <= LOG_LIMIT
    torch.testing.assert_close(first.ratio(x), first.log_ratio(x).exp())


def test_samples_of_any_shape_and_columns_that_never_vary():
    p, q = draw(200, 4, 1), draw(200, 4, 2, 0.0, 1.0)
    p[:, 3] = q[:, 3] = 7.0
    flat = fit_ratio(p, q, "knn", neighbours=5)
    square = fit_ratio(p.reshape(-1, 2, 2), q.reshape(-1, 2, 2), "knn", neighbours=5)
    without = fit_ratio(p[:, :3], q[:, :3], "knn", neighbours=5)
    x = draw(50, 4, 3)
    assert torch.equal(flat.log_ratio(x), square.log_ratio(x.reshape(-1, 2, 2)))
    assert torch.equal(flat.log_ratio(x), without.log_ratio(x[:, :3]))
    line = fit_ratio(p[:, 0], q[:, 0], "knn", neighbours=5)
    assert line.log_ratio(x[:, 0]).shape == (50,)
    assert line.log_ratio(x[:0, 0]).shape == (0,)


@pytest.mark.parametrize("calibration", ["platt", "temperature", "isotonic"])
def test_a_calibrated_classifier_recovers_the_ratio(calibration):
    p, q = draw(2000, 1, 1), draw(1500, 1, 2, 0.0, 1.0)
    ratio = fit_ratio(p, q, model="quadratic", calibration=calibration)
    x = draw(500, 1, 3)
    assert (ratio.log_ratio(x) - truth(x)).abs().median() < 0.25
    assert ratio.chosen["calibration"] == calibration


def test_a_network_learns_what_a_regression_cannot():
    g = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2000, 2, generator=g, dtype=torch.float64)
    modes = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)

    def mixture(n):
        noise = 0.5 * torch.randn(n, 2, generator=g, dtype=torch.float64)
        return modes[torch.randint(3, (n,), generator=g)] + noise

    def log_r(x):
        near = torch.logsumexp(-2 * (x[:, None] - modes).square().sum(-1), 1) - math.log(3 * 0.25)
        return near + x.square().sum(1) / 8 + math.log(4)

    p, x = mixture(2000), mixture(1000)
    regression, network = (
        (fit_ratio(p, q, model=model).log_ratio(x) - log_r(x)).square().mean().sqrt().item()
        for model in ("quadratic", "mlp")
    )
    assert network < 0.6  # the log-ratio ranges over several nats here
    assert network < 0.5 * regression
    nothing = fit_ratio(p, q, model="mlp", steps=0)
    assert nothing.chosen["steps"] == 0


def test_fitting_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    fit_ratio(draw(100, 2, 1), draw(100, 2, 2), "telescoping", steps=20)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_trusted_says_so():
    p, q = draw(100, 9, 1), draw(100, 9, 2, 0.0, 1.0)
    for method in ("knn", "kliep", "ulsif", "rulsif"):
        assert any("9 dimensions" in w for w in fit_ratio(p, q, method).warnings)
    twice = torch.cat([p[:, :2], p[:, :2]])
    assert any("equal" in w for w in fit_ratio(twice, q[:, :2], "knn").warnings)
    flat = p.clone()
    flat[:, 0] = 1.0
    assert any("constant in one sample" in w for w in fit_ratio(flat, q, "kliep").warnings)
    with pytest.raises(UserError, match="too many numbers per sample"):
        fit_ratio(torch.rand(20, 3000), torch.rand(20, 3000))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_on_an_accelerator(method):
    p, q, x = draw(400, 2, 1), draw(300, 2, 2, 0.0, 1.0), draw(50, 2, 3)
    here = fit_ratio(p, q, method, seed=1)
    there = fit_ratio(p.cuda(), q.cuda(), method, seed=1)
    log_r = there.log_ratio(x.cuda())
    assert log_r.device.type == "cuda"
    loose = 0.05 if method in ("classifier", "telescoping") else 1e-6  # float32 training of the network
    torch.testing.assert_close(log_r.cpu(), here.log_ratio(x), rtol=loose, atol=loose)


GOOD = draw(50, 2, 1)


@pytest.mark.parametrize(
    ("p", "q", "options", "message"),
    [
        (GOOD.long(), GOOD, {}, "x_p must be a tensor of real numbers"),
        (GOOD.numpy(), GOOD, {}, "x_p must be a tensor"),
        (GOOD, GOOD[:1], {}, "x_q has too few samples"),
        (GOOD[:0], GOOD, {}, "x_p has too few samples"),
        (GOOD, GOOD[:, :0], {}, "x_q has too few samples"),
        (GOOD, GOOD[:, :1], {}, "different shapes"),
        (GOOD, GOOD.clone().index_fill_(0, torch.tensor([3]), math.nan), {}, "not finite"),
        (GOOD, torch.full_like(GOOD, math.inf), {}, "not finite"),
        (GOOD, torch.ones_like(GOOD), {}, "x_q is constant"),
        (GOOD, GOOD, {"method": "ulsiff"}, "ulsif"),
        (GOOD, GOOD, {"method": "ulsif", "bridges": 3}, "does not take this setting"),
        (GOOD, GOOD, {"method": "ulsif", "widths": [0.0]}, "positive"),
        (GOOD, GOOD, {"method": "ulsif", "ridges": []}, "positive"),
        (GOOD, GOOD, {"method": "kliep", "centres": 0}, "centres"),
        (GOOD, GOOD, {"method": "kliep", "folds": 1}, "folds"),
        (GOOD, GOOD, {"method": "rulsif", "alpha": 1.0}, "alpha"),
        (GOOD, GOOD, {"method": "knn", "neighbours": 50}, "neighbours"),
        (GOOD, GOOD, {"method": "telescoping", "bridges": 0}, "bridges"),
        (GOOD, GOOD, {"model": "forest"}, "model"),
        (GOOD, GOOD, {"calibration": "plat"}, "platt"),
        (GOOD, GOOD, {"steps": -1}, "steps"),
        (GOOD, GOOD, {"held_out": 1.0}, "held_out"),
    ],
)
def test_bad_input_is_refused(p, q, options, message):
    with pytest.raises(UserError, match=message):
        fit_ratio(p, q, **options)


@pytest.mark.parametrize("x", [GOOD[:, :1], GOOD[0], GOOD.long(), GOOD.new_full((3, 2), math.nan)])
def test_bad_points_are_refused(x):
    ratio = fit_ratio(draw(50, 2, 1), draw(50, 2, 2), "knn")
    with pytest.raises(UserError):
        ratio.log_ratio(x)


@pytest.mark.parametrize("method", METHODS)
def test_supports_that_do_not_overlap_give_finite_ratios_and_a_warning(method):
    g = torch.Generator().manual_seed(0)
    p, q = torch.rand(200, 2, generator=g) + 5.0, torch.rand(200, 2, generator=g)
    ratio = fit_ratio(p, q, method, **quick(method))
    assert ratio.log_ratio(torch.cat([p, q])).isfinite().all()
    assert not ratio.reliable, ratio
