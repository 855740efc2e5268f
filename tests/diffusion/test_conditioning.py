"""Conditionings of any fields: operations on rows, what models take, and laws of guidance. Exact mixtures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import (
    UNCONDITIONAL,
    Conditioning,
    FieldSpec,
    as_conditioning,
    cat,
    check_conditioning,
    has_condition,
    null_conditioning,
    spec_of,
)
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.likelihood import log_likelihood
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import grid, sample_teacher, solve
from distmatch.diffusion.trajectory import x0_trajectory

MEANS, COVARIANCES = [[-1.0, 0.2], [1.0, 0.5], [0.3, -1.2]], [0.05, 0.1, 0.2]
BY_CLASS = GaussianMixture([0.5, 0.3, 0.2], MEANS, COVARIANCES, [0, 1, 2], sigma_max=20.0)
LABELS = torch.arange(12) % 3
GEN = torch.Generator().manual_seed(0)
X = 2 * torch.randn(12, 2, dtype=torch.float64, generator=GEN)
SIGMA = torch.linspace(0.1, 3, 12, dtype=torch.float64)
NULL = Conditioning({"weights": torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)})


def by_weights(x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
    """E[x0 | x] of a mixture whose component weights are the condition: a float vector for each sample."""
    apart = x[:, None] - torch.tensor(MEANS, dtype=x.dtype)
    own = torch.tensor(COVARIANCES, dtype=x.dtype)
    variance = own + (t**2)[:, None]
    log_p = weights.to(x).log() - 0.5 * apart.square().sum(2) / variance - variance.log()
    means = torch.tensor(MEANS, dtype=x.dtype) + (own / variance)[..., None] * apart
    return (log_p.softmax(1)[..., None] * means).sum(1)


BY_WEIGHTS = dm.as_denoiser(
    by_weights,
    "edm",
    "x0",
    shape=(2,),
    sigma_data=BY_CLASS.sigma_data,
    sigma_min=BY_CLASS.sigma_min,
    sigma_max=20.0,
    conditioning={"weights": FieldSpec((3,))},
    null=NULL,
)
ONE_HOT = Conditioning({"weights": torch.eye(3)[LABELS]})
"""The condition that says what LABELS say."""


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_operations_on_rows_are_those_of_their_fields() -> None:
    given = Conditioning({"label": LABELS, "text": torch.randn(12, 5, 4, generator=GEN)})
    mask = LABELS > 0
    assert given.batch_size == 12
    assert torch.equal(given.index(slice(2, 7))["text"], given["text"][2:7])
    assert torch.equal(given.index(mask)["label"], LABELS[mask])
    assert torch.equal(given.repeat(3)["label"], LABELS.repeat(3))
    assert torch.equal(given.repeat(3)["text"], given["text"].repeat(3, 1, 1))
    both = cat([given, given.index(slice(3))])
    assert torch.equal(both["text"], torch.cat([given["text"], given["text"][:3]]))
    other = Conditioning({"label": torch.full((12,), -1), "text": torch.zeros(12, 5, 4)})
    mixed = given.where(mask, other)
    assert torch.equal(mixed["label"], torch.where(mask, LABELS, -1))
    assert torch.equal(mixed["text"][mask], given["text"][mask])
    assert not mixed["text"][~mask].any()
    assert torch.equal(given.index(slice(1)).expand(4)["text"], given["text"][:1].expand(4, 5, 4))
    assert set(copy.deepcopy(given)) == set(given)


def test_the_empty_conditioning_is_any_number_of_samples() -> None:
    for same in (
        UNCONDITIONAL.index(slice(2)),
        UNCONDITIONAL.repeat(2),
        UNCONDITIONAL.expand(4),
        cat([UNCONDITIONAL]),
    ):
        assert len(same) == 0
    check_conditioning(UNCONDITIONAL, 7, spec_of(BY_CLASS))
    assert as_conditioning(None) is UNCONDITIONAL
    assert has_condition(UNCONDITIONAL) is False


def test_no_condition_has_one_meaning() -> None:
    null = null_conditioning(BY_CLASS, 12)
    assert torch.equal(null["label"], torch.full((12,), -1))
    plain = BY_CLASS(X, SIGMA)
    for same in (UNCONDITIONAL, null, torch.full((12,), -1)):
        assert torch.equal(BY_CLASS(X, SIGMA, same), plain)
    weights = BY_WEIGHTS(X, SIGMA)
    close(weights, plain)
    assert torch.equal(BY_WEIGHTS(X, SIGMA, null_conditioning(BY_WEIGHTS, 12)), weights)


def test_a_condition_of_any_field_does_what_labels_do() -> None:
    """Component weights as a float field are the classes of the mixture: every consumer must agree."""
    one_hot = Conditioning({"weights": torch.eye(3, dtype=torch.float64)[LABELS]})
    close(BY_WEIGHTS(X, SIGMA, one_hot), BY_CLASS(X, SIGMA, LABELS))
    levels = grid("karras", 8, 0.05, 20.0)
    start = 20.0 * torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(
        solve(BY_WEIGHTS, start, levels, conditioning=one_hot).y,
        solve(BY_CLASS, start, levels, conditioning=LABELS).y,
    )
    for scale in (0.0, 2.5):
        guided = Guided(BY_WEIGHTS, scale), Guided(BY_CLASS, scale)
        close(guided[0](X, SIGMA, one_hot), guided[1](X, SIGMA, LABELS))
        assert guided[0].cost(SIGMA, one_hot) == guided[1].cost(SIGMA, LABELS)
    drawn = [
        sample_teacher(model, 12, steps=6, conditioning=told, batch=5)
        for model, told in ((BY_WEIGHTS, ONE_HOT), (BY_CLASS, LABELS))
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    ways = [
        x0_trajectory(model, 12, levels, conditioning=told, batch=5).final
        for model, told in ((BY_WEIGHTS, ONE_HOT), (BY_CLASS, LABELS))
    ]
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-4)
    rows = X[:4]
    found = [
        log_likelihood(model, rows, conditioning=told, sigma_max=20.0, trace="exact", batch=3).log_prob
        for model, told in ((BY_WEIGHTS, one_hot.index(slice(4))), (BY_CLASS, LABELS[:4]))
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_guidance_away_from_a_negative_condition() -> None:
    """D(negative) + w (D(condition) - D(negative)), from two separate calls."""
    negative = torch.tensor([2])
    main, away = BY_CLASS(X, SIGMA, LABELS), BY_CLASS(X, SIGMA, torch.full((12,), 2))
    close(Guided(BY_CLASS, 3.0, negative=negative)(X, SIGMA, LABELS), away + 3.0 * (main - away))
    own = Conditioning({"weights": torch.eye(3, dtype=torch.float64)[2:]})
    one_hot = Conditioning({"weights": torch.eye(3, dtype=torch.float64)[LABELS]})
    close(Guided(BY_WEIGHTS, 3.0, negative=own)(X, SIGMA, one_hot), away + 3.0 * (main - away))
    plain = BY_CLASS(X, SIGMA)
    close(Guided(BY_CLASS, 3.0, negative=negative)(X, SIGMA), away + 3.0 * (plain - away))


def test_labels_and_null_class_by_name() -> None:
    """A network that counts "no class" as a class of its own gets that class in a named field too."""
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return x

    spec = {"label": FieldSpec((), torch.int64, 3)}
    model = dm.as_denoiser(net, "edm", "x0", shape=(2,), conditioning=spec, null_class=3)
    assert model.num_classes == 3
    model(X, SIGMA)
    model(X, SIGMA, torch.where(LABELS > 0, LABELS, -1))
    assert torch.equal(seen[0], torch.full((12,), 3))
    assert torch.equal(seen[1], torch.where(LABELS > 0, LABELS, 3))


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(UserError, match=r"one row for each sample.*a: 2 rows, b: 3 rows"):
        Conditioning({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(UserError, match="must be a tensor"):
        Conditioning({"a": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"takes another conditioning.*Got: label. Expected: weights"):
        solve(BY_WEIGHTS, X, [3.0, 1.0], conditioning=LABELS)
    with pytest.raises(UserError, match=r"does not match this model.*Expected: .batch, 3."):
        solve(BY_WEIGHTS, X, [3.0, 1.0], conditioning=Conditioning({"weights": torch.ones(12, 4)}))
    with pytest.raises(UserError, match=r"out of range.*values 0 to 3"):
        solve(BY_CLASS, X, [3.0, 1.0], conditioning=torch.arange(12) % 4)
    with pytest.raises(UserError, match="12 for 3 samples"):
        solve(BY_CLASS, X[:3], [3.0, 1.0], conditioning=LABELS)
    with pytest.raises(UserError, match="whole numbers"):
        as_conditioning(torch.zeros(3))
    with pytest.raises(UserError, match="same fields"):
        cat([ONE_HOT, as_conditioning(LABELS)])
    bare = dm.as_denoiser(by_weights, "edm", "x0", shape=(2,), conditioning={"weights": FieldSpec((3,))})
    with pytest.raises(UserError, match=r"without an unconditional prediction.*pass null="):
        bare(X, SIGMA)
