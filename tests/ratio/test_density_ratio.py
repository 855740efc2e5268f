"""Fitted density ratios against the known ratio of Gaussians, and against brute force."""

import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.ratio import METHODS, fit_ratio
from distmatch.ratio.samples import LOG_LIMIT
from tests.reference.ratio_samples import draw, error, quick, truth

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
    flat = fit_ratio(p, q, "knn", neighbors=5)
    square = fit_ratio(p.reshape(-1, 2, 2), q.reshape(-1, 2, 2), "knn", neighbors=5)
    without = fit_ratio(p[:, :3], q[:, :3], "knn", neighbors=5)
    x = draw(50, 4, 3)
    assert torch.equal(flat.log_ratio(x), square.log_ratio(x.reshape(-1, 2, 2)))
    assert torch.equal(flat.log_ratio(x), without.log_ratio(x[:, :3]))
    line = fit_ratio(p[:, 0], q[:, 0], "knn", neighbors=5)
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
        (GOOD.long(), GOOD, {}, "x_p must be a floating-point tensor"),
        (GOOD.numpy(), GOOD, {}, "x_p must be a floating-point tensor"),
        (GOOD, GOOD[:1], {}, "too few samples of x_q"),
        (GOOD[:0], GOOD, {}, "too few samples of x_p"),
        (GOOD, GOOD[:, :0], {}, "no coordinates"),
        (GOOD, GOOD[:, :1], {}, "different shapes"),
        (GOOD, GOOD.clone().index_fill_(0, torch.tensor([3]), math.nan), {}, "not finite"),
        (GOOD, torch.full_like(GOOD, math.inf), {}, "not finite"),
        (GOOD, torch.ones_like(GOOD), {}, "samples of x_q are all equal"),
        (GOOD, GOOD, {"method": "ulsiff"}, "ulsif"),
        (GOOD, GOOD, {"method": "ulsif", "bridges": 3}, "does not take this setting"),
        (GOOD, GOOD, {"method": "ulsif", "widths": [0.0]}, "positive"),
        (GOOD, GOOD, {"method": "ulsif", "ridges": []}, "positive"),
        (GOOD, GOOD, {"method": "kliep", "centers": 0}, "centers"),
        (GOOD, GOOD, {"method": "kliep", "folds": 1}, "folds"),
        (GOOD, GOOD, {"method": "rulsif", "alpha": 1.0}, "alpha"),
        (GOOD, GOOD, {"method": "knn", "neighbors": 50}, "neighbors"),
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
