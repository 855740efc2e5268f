"""Every row of the table against its textbook formula: float64 autograd, 250-digit arithmetic at the ends."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from scipy.special import lambertw

from distmatch.base.errors import UserError
from distmatch.divergences import NAMES, Divergence, alpha, divergence

LOG2 = math.log(2.0)
ALPHAS = (-3.0, -0.5, -0.05, 1e-9, 0.3, 0.5, 0.95, 1 + 1e-9, 1.05, 1.5, 3.3)
SHARES = tuple(
    f"{family}:{a}"
    for family in ("gjs", "skew_kl", "skew_reverse_kl")
    for a in (1e-06, 0.02, 0.4, 0.9, 0.999)
)
SMOOTH = (*(n for n in NAMES if n != "tv"), *(f"alpha:{a!r}" for a in ALPHAS), *SHARES)


def textbook(name: str, m):
    """The textbook generator as a function of r, and f'(1), for a module ``m`` with log and sqrt."""
    if name.startswith("alpha:"):
        a = float(name.removeprefix("alpha:"))
        if m is mpmath:
            a = mpmath.mpf(a)
        return (lambda r: (r**a - a * r + a - 1) / (a * (a - 1))), 0
    if name in SHARES:
        family, _, number = name.partition(":")
        a = mpmath.mpf(float(number)) if m is mpmath else float(number)
        return {
            "gjs": (lambda r: a * r * m.log(r) - (a * r + 1 - a) * m.log(a * r + 1 - a), 0),
            "skew_kl": (lambda r: r * m.log(r / (a * r + 1 - a)), 1 - a),
            "skew_reverse_kl": (lambda r: -m.log((1 - a) * r + a), -(1 - a)),
        }[family]
    return {
        "reverse_kl": (lambda r: -m.log(r), -1),
        "kl": (lambda r: r * m.log(r), 1),
        "js": (lambda r: (r * m.log(r) - (r + 1) * m.log((r + 1) / 2)) / 2, 0),
        "jeffreys": (lambda r: (r - 1) * m.log(r), 0),
        "hellinger": (lambda r: (m.sqrt(r) - 1) ** 2, 0),
        "softened_reverse_kl": (lambda r: (r + 1) * m.log((r + 1) / (2 * r)), -1),
        "softened_kl": (lambda r: (r + 1) * m.log((r + 1) / 2), 1),
        "pearson": (lambda r: (r - 1) ** 2, 0),
        "neyman": (lambda r: (1 - r) ** 2 / r, 0),
        "le_cam": (lambda r: (r - 1) ** 2 / (r + 1), 0),
    }[name]


@pytest.mark.parametrize("name", [n for n in SMOOTH if "00000" not in n and "1e-09" not in n])
def test_derivatives_match_float64_autograd_of_the_textbook_generator(name):
    log_r = torch.linspace(-6, 6, 241, dtype=torch.float64)
    r = log_r.exp().requires_grad_()
    f, tilt = textbook(name, torch)
    value = f(r)
    (df,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    (d2f,) = torch.autograd.grad(df.sum(), r)
    d = divergence(name)
    # Tolerance: the textbook formulas cancel near r = 1 and divide by a (a - 1); ours do not.
    for ours, theirs in [
        (d.f(log_r), value - tilt * (r - 1)),
        (d.df(log_r), df - tilt),
        (d.d2f(log_r), d2f),
        (d.weight(log_r), r**2 * d2f),
    ]:
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-12)


def relative_derivative(f, r):
    """r f'(r) by a central difference with a relative step of 1e-50 (error 1e-100)."""
    e = mpmath.mpf(10) ** -50
    return (f(r * (1 + e)) - f(r * (1 - e))) / (2 * e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMOOTH)
def test_values_and_gradients_keep_their_digits_from_minus_80_to_80(name, dtype):
    points = [-80.0, -40.0, -12.0, -0.51, -1e-4, 0.0, 1e-4, 0.49, 3.0, 25.0, 80.0]
    d = divergence(name)
    limits = torch.finfo(dtype)
    # exp(80) has a relative error of 80 rounding units; 64 more for sums, and a (up to 3.3) multiplies log r.
    rtol = 400 * limits.eps
    with mpmath.workdps(250):
        f, tilt = textbook(name, mpmath)

        def centered(r):
            return f(r) - tilt * (r - 1)

        def slope(r):
            return relative_derivative(centered, r) / r

        def weight(r):
            return r * relative_derivative(slope, r)

        exact = {"f": centered, "df": slope, "d2f": lambda r: weight(r) / r**2, "weight": weight}
        for function, true in exact.items():
            x = torch.tensor(points, dtype=dtype, requires_grad=True)
            value = getattr(d, function)(x)
            gradient = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)
            assert value.isfinite().all(), function
            assert gradient.isfinite().all(), function
            for log_r, ours, ours_gradient in zip(x.tolist(), value.tolist(), gradient.tolist(), strict=True):
                r = mpmath.exp(log_r)
                pairs = [(ours, true(r))]
                if function != "d2f":
                    pairs.append((ours_gradient, relative_derivative(true, r)))
                for got, want in pairs:
                    # Not representable: saturates or underflows. Below 1e-40: the noise of the differences.
                    if 1e-40 < abs(want) < limits.max / 4 and abs(want) > 10 * limits.tiny:
                        assert got == pytest.approx(float(want), rel=rtol), (function, log_r)


@pytest.mark.parametrize(
    "name",
    [*NAMES, "alpha:0", "alpha:-0.05", "alpha:1.05", "alpha:300", "alpha:-300", "alpha:1e-300", *SHARES],
)
def test_far_outside_everything_stays_finite_and_nan_stays_nan(name):
    d = divergence(name)
    for function in (d.f, d.df, d.d2f, d.weight):
        x = torch.tensor([-1e4, -200.0, -88.5, 44.3, 88.5, 200.0, 1e4], requires_grad=True)
        value = function(x)
        assert value.isfinite().all()
        if value.requires_grad:
            assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()
        nan = torch.tensor([math.nan, 0.5])
        assert function(nan).isnan().tolist() == [True, False]
    assert d.conjugate(torch.tensor([math.nan, -0.5])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", SMOOTH)
def test_generator_is_centered_and_never_negative(name):
    d = divergence(name)
    zero = torch.zeros(1)
    assert d.f(zero).item() == 0
    assert d.df(zero).item() == pytest.approx(0, abs=1e-7)
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 0.1, 5.0):
        assert (d.f(scale * noise) >= 0).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_fenchel_equality_and_fenchel_young_inequality(name):
    d = divergence(name)
    log_r = torch.linspace(-4, 4, 81, dtype=torch.float64)
    r, t = log_r.exp(), d.df(log_r)
    # f*(f'(r)) = r f'(r) - f(r). Tolerance: conjugates lose digits near the pole at the end of the domain.
    size = 1 + r * t.abs() + d.f(log_r)
    assert ((d.f(log_r) + d.conjugate(t) - r * t).abs() / size).max() < 1e-9
    anywhere = 6 * torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 4
    gap = d.f(log_r)[:, None] + d.conjugate(anywhere)[None] - r[:, None] * anywhere[None]
    assert gap.min() > -1e-9


@pytest.mark.parametrize("name", [*SMOOTH, "tv"])
def test_conjugate_outside_its_domain_and_its_gradient_is_the_maximizer(name):
    d = divergence(name)
    low, high = d.conjugate_domain
    assert low == -math.inf
    if math.isfinite(high):
        t = torch.tensor([high - 0.3, high, high + 1e-6, high + 3], dtype=torch.float64, requires_grad=True)
        value = d.conjugate(t)
        assert value[0].isfinite()
        assert value[1].item() == d.conjugate_limit
        assert (value[2:] == math.inf).all()
        (gradient,) = torch.autograd.grad(value[:1].sum(), t)
        assert gradient.isfinite().all()
    if name != "tv":
        log_r = torch.linspace(-3, 3, 13, dtype=torch.float64)
        t = d.df(log_r).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(d.conjugate(t).sum(), t)
        torch.testing.assert_close(gradient, log_r.exp(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "kink", "floor"),
    [
        ("pearson", -2.0, -1.0),
        ("le_cam", -3.0, -1.0),
        ("softened_kl", -LOG2, LOG2 - 1),
        ("tv", -0.5, -0.5),
        ("alpha:3", -0.5, -1 / 3),
        ("skew_reverse_kl:0.4", -0.9, math.log(0.4) + 0.6),
    ],
)
def test_conjugate_is_constant_below_the_slope_at_zero(name, kink, floor):
    t = torch.tensor([kink, kink - 0.1, kink - 50], dtype=torch.float64, requires_grad=True)
    value = divergence(name).conjugate(t)
    torch.testing.assert_close(value.detach(), torch.full_like(t, floor).detach())
    (gradient,) = torch.autograd.grad(value.sum(), t)
    assert gradient[1:].abs().max() < 1e-6


@pytest.mark.parametrize(
    "name", ["neyman", "le_cam", "softened_reverse_kl", "tv", "alpha:-0.5", "alpha:-3", "skew_kl:0.4"]
)
def test_conjugate_reaches_its_limit_at_the_end_of_the_domain(name):
    d = divergence(name)
    high = d.conjugate_domain[1]
    near, at = d.conjugate(torch.tensor([high - 1e-12, high], dtype=torch.float64)).tolist()
    # It rises to the limit like a cube root at the slowest (a = -0.5): 2 * (1.5e-12)^(1/3) = 2.3e-4.
    assert at == pytest.approx(near, abs=3e-4)


def test_the_numerical_conjugates_match_their_lambert_forms():
    t = torch.linspace(-20, 0.3, 60, dtype=torch.float64)
    w = torch.from_numpy(lambertw((1 - t).exp().numpy()).real)
    torch.testing.assert_close(divergence("jeffreys").conjugate(t), w + 1 / w + t - 2, rtol=1e-10, atol=1e-12)
    # Centering moves the argument by f'(1) = -1: f_c*(t) = f*(t - 1) + 1.
    w = torch.from_numpy(lambertw(-2 * (t - 2).exp().numpy(), k=-1).real)
    torch.testing.assert_close(
        divergence("softened_reverse_kl").conjugate(t), 2 - t + w, rtol=1e-8, atol=1e-10
    )


# The powers of r as which f'' falls for large r and rises for small r.
TAILS = {
    "reverse_kl": (-2, -2),
    "softened_reverse_kl": (-3, -2),
    "js": (-2, -1),
    "hellinger": (-1.5, -1.5),
    "kl": (-1, -1),
    "jeffreys": (-1, -2),
    "pearson": (0, 0),
    "neyman": (-3, -3),
    "softened_kl": (-1, 0),
    "le_cam": (-3, 0),
}


@pytest.mark.parametrize("name", TAILS)
def test_the_tails_of_the_curvature_say_what_is_forgiven(name):
    """Xu et al. (f-distill), table 6: a smaller right tail and a larger left one seek modes more."""
    d2f = divergence(name).d2f
    for end, power in zip((60.0, -60.0), TAILS[name], strict=True):
        near, far = d2f(torch.tensor([end, end + math.copysign(1.0, end)], dtype=torch.float64)).log()
        assert math.copysign(1.0, end) * (far - near).item() == pytest.approx(power, abs=1e-9)


def test_pointwise_identities_between_weights():
    x = torch.linspace(-10, 10, 101, dtype=torch.float64)
    h = {name: divergence(name).weight(x) for name in NAMES}
    one = torch.ones_like(x)
    torch.testing.assert_close(h["softened_reverse_kl"] + 2 * h["js"], one)
    torch.testing.assert_close(h["jeffreys"], h["kl"] + h["reverse_kl"])
    at_one = [divergence(n).weight(torch.zeros(1)).item() for n in ("js", "hellinger", "pearson", "le_cam")]
    assert at_one == pytest.approx([0.25, 0.5, 2.0, 1.0])
    for name in NAMES:
        dual = divergence(name).dual()
        torch.testing.assert_close(dual.weight(x), x.exp() * divergence(name).weight(-x))
        torch.testing.assert_close(dual.f(x), x.exp() * divergence(name).f(-x))
        assert dual.dual().name == name


@pytest.mark.parametrize(
    ("a", "name", "factor"),
    [(0, "reverse_kl", 1), (1, "kl", 1), (0.5, "hellinger", 2), (2, "pearson", 0.5), (-1, "neyman", 0.5)],
)
def test_special_cases_of_the_alpha_family(a, name, factor):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    ours, row = alpha(a), divergence(name)
    for function in ("f", "df", "d2f", "weight"):
        torch.testing.assert_close(getattr(ours, function)(x), factor * getattr(row, function)(x))
    # (c f)*(t) = c f*(t / c)
    t = torch.linspace(-3, 0.4, 50, dtype=torch.float64)
    torch.testing.assert_close(ours.conjugate(t), factor * row.conjugate(t / factor))
    assert ours.dual().name == f"alpha:{1 - a:g}"


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_promoted_and_float64_is_kept(name):
    d = divergence(name)
    x = torch.tensor([-9.0, -0.25, 0.0, 0.5, 9.0])  # exact in bfloat16
    for function in (d.f, d.df, d.d2f, d.weight):
        for dtype in (torch.bfloat16, torch.float16):
            assert function(x.to(dtype)).dtype == torch.float32
            torch.testing.assert_close(function(x.to(dtype)), function(x), rtol=0, atol=0)
        assert function(x.double()).dtype == torch.float64
        assert function(x.reshape(5, 1)).shape == (5, 1)
        assert function(torch.empty(0)).shape == (0,)
    assert d.conjugate(x.bfloat16()).dtype == torch.float32


def test_names_aliases_and_spelling():
    assert divergence("RKL").name == "reverse_kl"
    assert divergence(" Forward-KL ").name == "kl"
    assert [divergence(n).name for n in ("fkl", "sh", "jf", "sf")] == [
        "kl",
        "hellinger",
        "jeffreys",
        "softened_reverse_kl",
    ]
    assert str(divergence("le-cam")) == "le_cam"
    assert divergence("alpha:-1.5").name == "alpha:-1.5"
    assert divergence("Alpha: 0.123456789").name == "alpha:0.123456789"
    row = divergence("js")
    assert divergence(row) is row
    assert isinstance(row, Divergence)
    for name in NAMES:
        assert divergence(name).name == name
        assert divergence(name).differentiable == (name != "tv")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("hellingr", "hellinger"),
        ("js:0.5", "unknown divergence"),
        ("", "unknown divergence"),
        (3, "unknown divergence"),
        (None, "unknown divergence"),
        ("alpha", "alpha:0.5"),
        ("alpha:", "alpha:0.5"),
        ("alpha:half", "alpha:0.5"),
        ("alpha:nan", "finite"),
        ("alpha:inf", "finite"),
        ("gjs:1", "less than 1"),
        ("gjs:0", "more than 0"),
        ("gjs", "gjs:0.5"),
        ("skew_kl:1", "less than 1"),
        ("skew_kl:nan", "less than 1"),
        ("skew_reverse_kl:-0.1", "0, or more"),
        ("gjs:1e-300", "more than 0"),
        ("renyi:0.5", "alpha"),
    ],
)
def test_a_bad_name_is_a_user_error_that_says_what_to_write(bad, says):
    with pytest.raises(UserError, match=says):
        divergence(bad)


def test_a_number_in_place_of_a_tensor_is_a_user_error():
    with pytest.raises(UserError, match="tensor"):
        divergence("js").f(0.5)
