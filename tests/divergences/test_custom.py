"""Custom generators reproduce the rows of the table, and mistakes in them are seen."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.divergences import custom, divergence

GENERATORS = {
    "js": lambda r: 0.5 * (r * r.log() - (r + 1) * ((r + 1) / 2).log()),
    "kl": lambda r: r * r.log(),
    "reverse_kl": lambda r: -r.log(),
    "pearson": lambda r: (r - 1) ** 2,
    "alpha:0.5": lambda r: (r**0.5 - 0.5 * r - 0.5) / (-0.25),
    "alpha:2.5": lambda r: (r**2.5 - 2.5 * r + 1.5) / 3.75,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_custom_reproduces_the_table(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = custom(GENERATORS[name])
    row = divergence(name)
    x = torch.linspace(-8, 8, 161, dtype=torch.float64)
    for function in ("f", "df", "d2f", "weight"):
        # The user's formula cancels: 1e-16 of terms of size r log r, against values of size 1.
        torch.testing.assert_close(
            getattr(ours, function)(x), getattr(row, function)(x), rtol=1e-8, atol=1e-11
        )
    t = torch.linspace(-1.5, 0.3, 19, dtype=torch.float64)
    torch.testing.assert_close(ours.conjugate(t), row.conjugate(t), rtol=1e-9, atol=1e-10)
    if math.isfinite(row.conjugate_domain[1]):
        above = torch.tensor([row.conjugate_domain[1] + 0.1], dtype=torch.float64)
        assert ours.conjugate(above).item() == math.inf
    torch.testing.assert_close(ours.dual().weight(x), row.dual().weight(x), rtol=1e-7, atol=1e-9)
    assert ours.dual().name == "custom_dual"
    assert ours.differentiable
    assert ours.mode_seeking == row.mode_seeking


def test_gradients_flow_through_a_custom_divergence():
    ours, row = custom(GENERATORS["js"]), divergence("js")
    for function in ("f", "df", "weight"):
        x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(getattr(ours, function)(x).sum(), x)
        (want,) = torch.autograd.grad(getattr(row, function)(x).sum(), x)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    t = torch.tensor([-1.0, 0.0, 0.3], requires_grad=True)
    (got,) = torch.autograd.grad(ours.conjugate(t).sum(), t)
    (want,) = torch.autograd.grad(row.conjugate(t).sum(), t)
    torch.testing.assert_close(got, want)


def test_custom_works_in_float32_without_a_graph_and_keeps_nan():
    ours = custom(GENERATORS["kl"], name="mine")
    with torch.no_grad():
        h = ours.weight(torch.tensor([math.nan, 1.0, 300.0]))
    assert h.dtype == torch.float32
    assert h[0].isnan()
    assert h[1].item() == pytest.approx(math.e, rel=1e-6)
    assert h[2].item() == torch.finfo(torch.float32).max
    assert ours.weight(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert str(ours) == "mine"
    assert divergence(ours) is ours


def test_a_generator_that_is_not_zero_at_one_is_shifted_with_a_warning():
    with pytest.warns(UserWarning, match=r"f\(1\) = 3"):
        ours = custom(lambda r: r * r.log() + 3)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(ours.f(x), divergence("kl").f(x))


def test_a_generator_that_is_not_convex_warns_with_the_place():
    with pytest.warns(UserWarning, match="not convex.* at r = "):
        custom(lambda r: r.log())


def test_a_generator_with_a_kink_has_no_gradient_for_distillation():
    ours = custom(lambda r: 0.5 * (r - 1).abs())
    assert not ours.differentiable
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(ours.f(x), divergence("tv").f(x))
    t = torch.tensor([-3.0, -0.2, 0.4])
    torch.testing.assert_close(ours.conjugate(t), divergence("tv").conjugate(t))


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (lambda r: r.sum(), "elementwise"),
        (lambda r: 1.0, "elementwise"),
        (lambda r: (r - 1).log(), "not finite"),
        (lambda r: (r - 1).sqrt() ** 2, "not finite"),
    ],
)
def test_a_generator_that_cannot_be_used_is_a_user_error(f, says):
    with pytest.raises(UserError, match=says):
        custom(f)
