"""Mixtures, shifts, flags and the numerical conjugate."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.divergences import FAMILIES, NAMES, Renyi, alpha, custom, divergence, gjs, measure, mixture
from distmatch.divergences.numerics import numeric_conjugate

X = torch.linspace(-9, 9, 73, dtype=torch.float64)
FUNCTIONS = ("f", "df", "d2f", "weight")


def test_mixtures_that_have_a_name_of_their_own():
    kl, rkl = divergence("kl"), divergence("rkl")
    ours, jeffreys = mixture([kl, rkl]), divergence("jeffreys")
    for function in FUNCTIONS:
        torch.testing.assert_close(2 * getattr(ours, function)(X), getattr(jeffreys, function)(X))
    # (f / 2)*(t) = f*(2 t) / 2
    t = torch.linspace(-30, 8, 77, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours.conjugate(t), 0.5 * jeffreys.conjugate(2 * t))
    # JS is half of two skew divergences with equal shares.
    parts = [divergence("skew_kl:0.5"), divergence("skew_reverse_kl:0.5")]
    js = mixture(parts)
    t = torch.linspace(-20, 0.34, 77, dtype=torch.float64)
    torch.testing.assert_close(js.f(X), divergence("js").f(X))
    torch.testing.assert_close(js.conjugate(t), divergence("js").conjugate(t), rtol=1e-9, atol=1e-12)
    assert js.upper_bound == pytest.approx(math.log(2))
    assert js.mode_seeking == "in between"


def test_a_mixture_is_the_weighted_sum_in_every_respect():
    parts = [divergence("hellinger"), divergence("le_cam"), divergence("tv")]
    ours = mixture(parts, [0.5, 0.3, 0.2])
    assert str(ours) == "mixture(0.5*hellinger+0.3*le_cam+0.2*tv)"
    assert ours.upper_bound == pytest.approx(0.5 * 2 + 0.3 * 2 + 0.2)
    assert not ours.differentiable
    assert mixture(parts[:2]).differentiable
    assert mixture(parts, [0.5, 0.5, 0.0]).differentiable
    torch.testing.assert_close(ours.dual().f(X), X.exp() * ours.f(-X))
    assert mixture(parts, name="mine").dual().name == "mine_dual"
    # At the end of the domain, f*(f'(inf)); the kinks of total variation leave Fenchel-Young intact.
    high = ours.conjugate_domain[1]
    near, at, above = ours.conjugate(
        torch.tensor([high - 1e-9, high, high + 1e-9], dtype=torch.float64)
    ).tolist()
    assert at == math.inf == above  # squared Hellinger: u t - f(u) grows like 2 sqrt(u)
    assert math.isfinite(near)
    t = torch.linspace(-3, high - 0.01, 50, dtype=torch.float64)
    gap = ours.f(X)[:, None] + ours.conjugate(t) - X.exp()[:, None] * t
    assert gap.min() > -1e-9
    assert gap.min(0).values.max() < 0.1  # and it is tight: the best grid point is near the maximizer
    # Total variation with Le Cam: both limits are finite.
    ends = mixture([divergence("neyman"), divergence("le_cam")], [0.25, 0.75])
    limit = ends.conjugate(torch.tensor([1.0 - 1e-13, 1.0], dtype=torch.float64)).tolist()
    assert limit[1] == pytest.approx(0.25 * 2 + 0.75 * 3)
    assert limit[0] == pytest.approx(limit[1], abs=1e-5)


@pytest.mark.parametrize(
    ("parts", "weights", "says"),
    [
        ([], None, "at least one"),
        (["kl"], [0.5, 0.5], "numbers of divergences and of weights"),
        (["kl", "js"], [1.5, -0.5], "shares"),
        (["kl", "js"], [0.5, 0.6], "shares"),
        (["kl", "js"], [0.5, math.nan], "shares"),
        (["kl", "js"], [0.0, 0.0], "shares"),
    ],
)
def test_a_mixture_refuses_what_is_no_share(parts, weights, says):
    with pytest.raises(UserError, match=says):
        mixture([divergence(n) for n in parts], weights)


def test_shifts_give_the_textbook_generators():
    r = X.exp()
    kl = divergence("kl").shifted(1.0)
    torch.testing.assert_close(kl.f(X), r * X)
    torch.testing.assert_close(kl.df(X), X + 1)
    t = torch.linspace(-5, 5, 21, dtype=torch.float64)
    torch.testing.assert_close(kl.conjugate(t), torch.exp(t - 1))
    rkl = divergence("rkl").shifted(-1.0)
    torch.testing.assert_close(rkl.f(X), -X, atol=1e-11, rtol=1e-9)
    assert rkl.conjugate_domain[1] == 0
    torch.testing.assert_close(rkl.conjugate(-t[t > 0]), -1 - t[t > 0].log())
    assert rkl.conjugate(torch.tensor([0.1])).item() == math.inf
    for name in NAMES:
        d = divergence(name)
        assert d.shifted(0.0) is d
        there = d.shifted(-2.5)
        assert (there.name, there.mode_seeking) == (name, d.mode_seeking)
        assert there.upper_bound == pytest.approx(d.upper_bound)
        torch.testing.assert_close(there.shifted(2.5).f(X), d.f(X), atol=1e-10, rtol=1e-9)
        far = torch.tensor([-1e4, -88.0, 88.0, 1e4], requires_grad=True)
        value = there.f(far)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), far)[0].isfinite().all()
    with pytest.raises(UserError, match="finite"):
        kl.shifted(math.inf)


def test_flags_say_which_missing_mass_costs_infinitely_much():
    flags = {name: divergence(name).mode_seeking for name in NAMES}
    assert {n for n, flag in flags.items() if flag == "mode-seeking"} == {
        "reverse_kl",
        "softened_reverse_kl",
        "neyman",
    }
    assert {n for n, flag in flags.items() if flag == "mode-covering"} == {
        "kl",
        "jeffreys",
        "softened_kl",
        "pearson",
    }
    assert [alpha(a).mode_seeking for a in (-1, 0, 0.5, 1, 2)] == [
        "mode-seeking",
        "mode-seeking",
        "in between",
        "mode-covering",
        "mode-covering",
    ]
    assert divergence("skew_kl:0").mode_seeking == "mode-covering"
    assert divergence("skew_kl:0.01").mode_seeking == "in between"
    assert mixture([divergence("js"), divergence("rkl")]).mode_seeking == "mode-seeking"


@pytest.mark.parametrize(
    "name", [*NAMES, *(f"{family}:0.3" for family in FAMILIES), "alpha:-1.5", "alpha:2.5"]
)
def test_the_values_at_the_ends_are_the_limits_of_the_functions(name):
    d = divergence(name)
    ends = torch.tensor([-700.0, 700.0], dtype=torch.float64)
    f, df = d.f(ends).tolist(), d.df(ends).tolist()
    assert f[0] > 600 if math.isinf(d.at_zero) else f[0] == pytest.approx(d.at_zero, rel=1e-9)
    high = d.conjugate_domain[1]
    assert df[1] > 600 if math.isinf(high) else df[1] == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_meet_the_table_at_their_ends(family):
    # gjs divided by b (1 - b) tends to KL for b to 0 and to reverse KL for b to 1.
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    if family == "gjs":
        for b, name in ((1e-7, "kl"), (1 - 1e-7, "reverse_kl")):
            torch.testing.assert_close(
                gjs(b).f(x) / (b * (1 - b)), divergence(name).f(x), rtol=1e-4, atol=1e-12
            )
        for function in FUNCTIONS:
            torch.testing.assert_close(
                getattr(gjs(0.5), function)(x), getattr(divergence("js"), function)(x), rtol=1e-12, atol=1e-14
            )
    else:
        end = "reverse_kl" if family in ("alpha", "skew_reverse_kl") else "kl"
        for function in FUNCTIONS:
            got = getattr(divergence(f"{family}:1e-7"), function)(x)
            torch.testing.assert_close(got, getattr(divergence(end), function)(x), rtol=1e-4, atol=1e-5)
            at = getattr(divergence(f"{family}:0"), function)(x)
            torch.testing.assert_close(at, getattr(divergence(end), function)(x))


def test_newton_needs_few_evaluations_and_survives_kinks_and_poles():
    for name, t in [
        ("jeffreys", torch.linspace(-300, 300, 61, dtype=torch.float64)),
        ("softened_reverse_kl", torch.linspace(-300, 0.3, 61, dtype=torch.float64)),
        ("skew_kl:0.01", torch.linspace(-300, 3.6, 61, dtype=torch.float64)),
        ("tv", torch.linspace(-0.49, 0.49, 9, dtype=torch.float64)),
        ("neyman", torch.linspace(-1e6, 0.999, 61, dtype=torch.float64)),
    ]:
        d, calls = divergence(name), 0

        def counted(x, d=d):
            nonlocal calls
            calls += 1
            return d.df(x)

        search = numeric_conjugate(d.f, counted, d.d2f)
        torch.testing.assert_close(search(t), d.conjugate(t), rtol=1e-9, atol=1e-10)
        # Bisection of [-700, 700] to 1e-13 takes 54; at a kink there is nothing better.
        assert calls < (80 if name == "tv" else 35), name


def test_a_custom_generator_finds_its_own_limits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = {
            "js": custom(lambda r: 0.5 * (r * r.log() - (r + 1) * ((r + 1) / 2).log())),
            "le_cam": custom(lambda r: (r - 1) ** 2 / (r + 1)),
            "kl": custom(lambda r: r * r.log()),
            "neyman": custom(lambda r: (1 - r) ** 2 / r),
            "softened_kl": custom(lambda r: (r + 1) * ((r + 1) / 2).log()),
            "jeffreys": custom(lambda r: (r - 1) * r.log()),
        }
    for name, ours in rows.items():
        row = divergence(name)
        assert ours.at_zero == pytest.approx(row.at_zero)
        assert ours.conjugate_domain[1] == pytest.approx(row.conjugate_domain[1])
        assert ours.upper_bound == pytest.approx(row.upper_bound)
        assert ours.dual().at_zero == pytest.approx(row.dual().at_zero)
        assert ours.dual().conjugate_domain[1] == pytest.approx(row.dual().conjugate_domain[1])
        assert ours.mode_seeking == row.mode_seeking
        t = torch.linspace(-80, min(row.conjugate_domain[1] - 0.01, 80.0), 50, dtype=torch.float64)
        torch.testing.assert_close(ours.conjugate(t), row.conjugate(t), rtol=1e-8, atol=1e-9)
    with pytest.warns(UserWarning, match=r"f\(1\) = 5"):
        raised = custom(lambda r: (r - 1) ** 2 / (r + 1) + 5)
    assert (raised.at_zero, raised.conjugate_domain[1]) == pytest.approx((1.0, 1.0))
    assert (raised.dual().at_zero, raised.dual().conjugate_domain[1]) == pytest.approx((1.0, 1.0))
    # Too slow to be seen: it must be told.
    slow = custom(lambda r: 1 - r**0.01, limits=(1.0, 0.0))
    assert slow.upper_bound == pytest.approx(1.0)


def test_renyi_is_known_to_the_evaluators_and_to_nobody_else():
    order = measure("Renyi:0.5")
    assert order == Renyi(0.5)
    assert str(order) == "renyi:0.5"
    assert order.alpha.name == "alpha:0.5"
    assert measure(order) is order
    assert measure("js") is divergence("js")
    for bad in ("renyi:0", "renyi:-1", "renyi:inf", "renyi:nan", "renyi:x", "renyi"):
        with pytest.raises(UserError, match=r"renyi|Renyi"):
            measure(bad)
    with pytest.raises(UserError, match="unknown divergence"):
        measure("nothing")
    with pytest.raises(UserError, match="not an f-divergence"):
        divergence("renyi:0.5")
