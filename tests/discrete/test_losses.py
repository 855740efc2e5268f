"""The losses of absorbing diffusion: all are the same bound, which is -log p where conditionals are exact."""

import math

import numpy as np
import pytest
import torch

from distmatch.discrete import discrete_loss, exact_bound, mask_schedule
from distmatch.discrete.likelihood import all_hidings
from distmatch.discrete.losses import hidden_nll, hide_count, hide_share, score_entropy, stratified
from tests.reference.discrete_models import Lookup, V, table


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truncated_bound(model, x, low, high):
    """The integral of E[sum over hidden -log c] / lambda over lambda in [low, high], for one (1, L)."""
    sets = all_hidings(x)
    nll = hidden_nll(model, x.expand(len(sets), -1), sets)
    nodes, weights = np.polynomial.legendre.leggauss(
        8
    )  # exact: the integrand is a polynomial of degree L - 1
    share = torch.tensor(low + (high - low) * (nodes + 1) / 2)[:, None]
    k = sets.sum(1)
    mean = (share**k * (1 - share) ** (x.shape[1] - k) * nll).sum(1) / share[:, 0]
    return float((torch.tensor(weights) * mean).sum() * (high - low) / 2)


def mean_and_error(model, x, loss, batches=150, size=200, **settings):
    """Mean of the loss of one sequence; the error over batches, whose levels depend on each other."""
    g = rng(sum(map(ord, loss)))
    copies = x.expand(size, -1)
    means = torch.stack(
        [discrete_loss(model, copies, loss, generator=g, **settings).mean() for _ in range(batches)]
    )
    return float(means.mean()), float(means.std()) / math.sqrt(batches)


@pytest.mark.parametrize("loss", ["lambda-dce", "k-dce", "ao-arm"])
@pytest.mark.parametrize("kind", ["exact", "arbitrary"])
@torch.no_grad()
def test_losses_without_a_time_are_the_bound(loss, kind):
    model = table() if kind == "exact" else Lookup()
    x = torch.tensor([[0, 2, 1, 1]])
    mean, error = mean_and_error(model, x, loss, 60)
    truth = float(exact_bound(model, x))
    if kind == "exact":
        assert truth == pytest.approx(-float(model.log_p[model.code(x)]), abs=1e-12)
    assert abs(mean - truth) < 4 * error + 1e-12  # the order does not matter to AO-ARM when c is exact
    assert error < 0.02 * truth


@pytest.mark.parametrize("loss", ["t-dse", "t-dce"])
@pytest.mark.parametrize("schedule", ["log-linear", "cosine", "geometric"])
@torch.no_grad()
def test_losses_in_time_are_the_bound_between_their_ends(loss, schedule):
    # A large cutoff, so that what it leaves out is far above the error; and the default, where it is not.
    model, x = Lookup(), torch.tensor([[0, 2, 1, 1]])
    cutoff = 0.3
    t = torch.tensor([cutoff, 1.0], dtype=torch.float64)
    low, high = mask_schedule(schedule).hidden(t).tolist()
    truth = truncated_bound(model, x, low, high)
    mean, error = mean_and_error(model, x, loss, 150, schedule=schedule, cutoff=cutoff)
    assert abs(mean - truth) < 4 * error
    assert error < 0.02 * truth
    whole = truncated_bound(model, x, 0.0, 1.0)
    assert whole == pytest.approx(float(exact_bound(model, x)), rel=1e-12)
    if schedule == "log-linear":
        assert whole - truth > 10 * error
        mean, error = mean_and_error(model, x, loss, 150)
        assert abs(mean - whole) < 4 * error


@pytest.mark.parametrize("schedule", ["log-linear", "cosine"])
def test_score_entropy_is_cross_entropy_draw_by_draw_when_conditionals_are_normalized(schedule):
    model, x = Lookup(), table().states
    both = [discrete_loss(model, x, name, generator=rng(3), schedule=schedule) for name in ("t-dse", "t-dce")]
    assert torch.allclose(*both, rtol=1e-9, atol=1e-12)


def test_score_entropy_is_its_definition_and_zero_at_the_true_score():
    x, hidden = torch.tensor([[1, 0, 2]]), torch.tensor([[True, False, True]])
    total = torch.tensor([0.7], dtype=torch.float64)
    ratio = 1 / math.expm1(0.7)
    log_s = torch.randn(1, 3, V, generator=rng(), dtype=torch.float64)
    by_hand = 0.0
    for i in (0, 2):
        s = log_s[0, i].exp()
        by_hand += float(s.sum()) - ratio * float(log_s[0, i, x[0, i]]) + ratio * (math.log(ratio) - 1)
    assert float(score_entropy(log_s, x, hidden, total)) == pytest.approx(by_hand, rel=1e-12)
    truth = torch.full((1, 3, V), -60.0, dtype=torch.float64).scatter(-1, x[..., None], math.log(ratio))
    assert float(score_entropy(truth, x, hidden, total)) == pytest.approx(0, abs=1e-12)
    assert by_hand > 0.1


def test_the_logit_of_the_hidden_symbol_counts_as_minus_infinity():
    class WithHidden(Lookup):
        def forward(self, tokens):
            return torch.cat([super().forward(tokens), torch.full((*tokens.shape, 1), 50.0)], dim=-1)

    x = table().states
    for loss in ("t-dse", "lambda-dce"):
        plain = discrete_loss(Lookup(), x, loss, generator=rng(1))
        assert torch.equal(plain, discrete_loss(WithHidden(), x, loss, generator=rng(1)))


@pytest.mark.parametrize("loss", ["t-dse", "lambda-dce", "k-dce", "ao-arm"])
def test_gradients_agree_with_finite_differences(loss):
    model, x = Lookup(), torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]])

    def value() -> torch.Tensor:
        return discrete_loss(model, x, loss, generator=rng(5)).sum()

    value().backward()
    largest = model.logits.grad.abs().flatten().topk(6).indices.tolist()
    assert model.logits.grad.abs().max() > 0.1
    flat = model.logits.data.view(-1)
    for i in largest:
        ends = []
        for shift in (1e-5, -2e-5):
            flat[i] += shift
            ends.append(float(value().detach()))
        flat[i] += 1e-5
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(model.logits.grad.view(-1)[i]), rel=1e-6)


def test_levels_are_stratified_and_uniform():
    draws = torch.stack([stratified(10, rng(i)) for i in range(2000)])
    assert bool((draws > 0).all() and (draws <= 1).all())
    assert torch.equal(((draws * 10).ceil() - 1).sort(1).values, torch.arange(10.0).double().expand(2000, 10))
    # Each by itself is uniform: its mean over 2000 independent offsets is 1/2 within 4 sigma.
    assert float((draws.mean(0) - 0.5).abs().max()) < 4 / math.sqrt(12 * 2000)


def test_as_many_tokens_are_hidden_as_asked():
    x = torch.zeros(4000, 8, dtype=torch.int64)
    count = torch.arange(1, 9).repeat(500)
    assert torch.equal(hide_count(x, count, rng()).sum(1), count)
    share = torch.full((4000,), 0.3)
    seen = hide_share(x, share, rng(1)).double().mean()
    assert abs(float(seen) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 32_000)
