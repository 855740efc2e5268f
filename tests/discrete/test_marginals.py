"""Marginalization models: exact marginals have no loss, sums and inequalities hold, gradients are right."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from distmatch.base.errors import UserError
from distmatch.discrete import (
    MarginalNet,
    TokenNet,
    TokenNetConfig,
    consistency_loss,
    exact_bound,
    gibbs_block,
    inequality_violation,
    reinforce_loss,
)
from tests.reference.discrete_models import L, Lookup, Uniform, V, brute_force_marginal, table


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scaled:
    """Marginals of a table, log-probabilities times a factor and plus a constant."""

    def __init__(self, factor: float = 1.0, constant: float = 0.0) -> None:
        self.table, self.factor, self.constant = table(), factor, constant
        self.vocabulary, self.length = V, L

    def log_marginal(self, tokens):
        return self.factor * self.table.log_marginal(tokens) + self.constant


def test_exact_marginals_have_no_loss():
    model = table()
    loss = consistency_loss(model, model, model.states, generator=rng())
    assert float(loss.max()) < 1e-24


def test_the_loss_is_its_definition():
    # With log-marginals doubled, each step is off by log c itself: the mean over orders and turns is
    # L E[(log c)^2] = E over orders of the sum of (log c)^2 along the order.
    model = table()
    x = model.states[[17]]
    steps = []
    seen = {(): torch.full((1, L), V)}
    for size in range(L):
        for shown in [s for s in seen if len(s) == size]:
            weight = 1 / math.comb(L, size) / (L - size)  # of this set and of each position outside it
            for i in set(range(L)) - set(shown):
                after = seen[shown].clone()
                after[0, i] = x[0, i]
                log_c = model.log_marginal(after) - model.log_marginal(seen[shown])
                steps.append(weight * float(log_c) ** 2)
                seen[tuple(sorted((*shown, i)))] = after
    loss = consistency_loss(Scaled(2.0), model, x.expand(20_000, -1), generator=rng(1))
    error = float(loss.std()) / math.sqrt(len(loss))
    assert abs(float(loss.mean()) - sum(steps)) < 4 * error
    assert error < 0.03 * sum(steps)


def test_a_wrong_constant_is_seen_by_the_normalization_alone():
    loss = consistency_loss(Scaled(1.0, 0.1), table(), table().states, generator=rng())
    assert torch.allclose(loss, torch.full_like(loss, 0.01), atol=1e-12)


def test_marginals_are_sums_over_what_is_hidden():
    model = table()
    for tokens in ([0, V, 2, V], [V, V, V, V], [V, 1, V, V], [1, 1, 0, 2]):
        x = torch.tensor(tokens)
        assert float(brute_force_marginal(model, x)) == pytest.approx(
            float(model.log_marginal(x[None])), abs=1e-12
        )
    assert float(brute_force_marginal(Scaled(2.0), torch.full((L,), V))) < -0.5  # not a law: seen


def test_a_law_violates_no_inequality_and_a_wrong_one_does():
    model = table()
    assert float(inequality_violation(model, model.states).max()) < 0
    assert float(inequality_violation(Scaled(-1.0), model.states).min()) > 0
    # The largest rise is that of the surest token: log p(x_S and x_i) - log p(x_S) = log c.
    x = model.states[[5]]
    surest = max(
        float(model(tokens).log_softmax(-1)[0, i, x[0, i]])
        for hidden in range(1, 2**L)
        for tokens in [x.masked_fill(torch.tensor([[bool(hidden >> i & 1) for i in range(L)]]), V)]
        for i in range(L)
        if hidden >> i & 1
    )
    assert float(inequality_violation(model, x)) == pytest.approx(surest, abs=1e-12)


@pytest.mark.parametrize("block", [1, 3, L])
def test_gibbs_sweeps_keep_the_law(block):
    model = table()
    x = model.sample(12_000, rng(2))
    for sweep in range(2):
        x = gibbs_block(model, x, block, generator=rng(10 + sweep))
    counts = torch.bincount(model.code(x), minlength=V**L)
    expected = model.log_p.exp() * len(x)
    kept = expected > 5
    statistic = float(((counts - expected) ** 2 / expected)[kept].sum())
    assert stats.chi2.sf(statistic, int(kept.sum()) - 1) > 1e-3


def test_gibbs_sweeps_reach_the_law_from_elsewhere_and_change_a_block_only():
    model = table()
    x = torch.zeros(20_000, L, dtype=torch.int64)
    once = gibbs_block(model, x, 2, generator=rng(3))
    assert int((once != x).sum(1).max()) == 2
    whole = gibbs_block(model, x, L, generator=rng(4))  # forgets the start at once
    counts = torch.bincount(model.code(whole), minlength=V**L)
    assert float((counts / len(x) - model.log_p.exp()).abs().sum()) / 2 < 0.03


class Softmax(nn.Module):
    """log p of whole sequences as a free table."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary, self.length = 2, 2
        self.logits = nn.Parameter(torch.log(torch.tensor([[0.1, 0.4], [0.3, 0.2]], dtype=torch.float64)))

    def log_marginal(self, tokens):
        return self.logits.flatten().log_softmax(0)[2 * tokens[:, 0] + tokens[:, 1]]


@pytest.mark.parametrize("contrast", [0.5, 4.0])
def test_reinforce_has_the_gradient_of_the_kl(contrast):
    # Ten rows in the proportions of p: the mean over the batch is the expectation, with no sampling error.
    model = Softmax()
    states = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    x = states.repeat_interleave(torch.tensor([1, 4, 3, 2]), dim=0)
    log_f = contrast * torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)

    def energy(tokens):
        return log_f[2 * tokens[:, 0] + tokens[:, 1]]

    surrogate, gap = reinforce_loss(model, energy, x)
    (estimated,) = torch.autograd.grad(surrogate, model.logits)
    log_p = model.log_marginal(states)
    kl = (log_p.exp() * (log_p - log_f)).sum() + log_f.logsumexp(0)
    (true,) = torch.autograd.grad(kl, model.logits)
    scale = max(float(gap.std()), 1.0)
    assert (scale > 1) == (contrast > 1)
    assert torch.allclose(estimated * scale, true, atol=1e-12)
    assert -float(gap.mean()) <= float(log_f.logsumexp(0))
    assert -float(gap.mean()) == pytest.approx(float(log_f.logsumexp(0) - kl.detach()), abs=1e-12)


def test_reinforce_does_not_see_the_scale_of_the_energy():
    # What the baseline is for: without it a constant in log f adds noise to the gradient of a finite batch.
    model = Softmax()
    x = torch.tensor([[0, 1], [1, 1], [0, 1]])
    gradients = [
        torch.autograd.grad(reinforce_loss(model, lambda t, c=c: t[:, 0] + c, x)[0], model.logits)[0]
        for c in (0.0, 50.0)
    ]
    assert torch.allclose(*gradients, atol=1e-12)


def test_gradients_of_the_consistency_agree_with_finite_differences():
    config = TokenNetConfig(vocabulary=V, length=L, width=8, depth=1, heads=2)
    nets = nn.ModuleList([MarginalNet(config), TokenNet(config)]).double()
    with torch.no_grad():
        for parameter in nets.parameters():
            parameter.normal_(std=0.4, generator=rng(6))
    x = table().sample(6, rng(7))

    def value():
        return consistency_loss(*nets, x, generator=rng(8)).sum()

    value().backward()
    for net in nets:
        for parameter in (net.last.weight, net.trunk.embedding.weight, net.trunk.blocks[0].qkv.weight):
            i = int(parameter.grad.abs().argmax())
            flat, ends = parameter.data.view(-1), []
            for shift in (1e-5, -2e-5):
                flat[i] += shift
                ends.append(float(value().detach()))
            flat[i] += 1e-5
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(parameter.grad.view(-1)[i]), rel=1e-5)


def test_consistent_conditionals_need_one_evaluation_instead_of_many():
    model = table()
    assert torch.allclose(model.log_marginal(model.states), -exact_bound(model, model.states), atol=1e-12)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: consistency_loss(table(), Uniform(V, 5), table().states, generator=rng()),
            "vocabularies and lengths",
        ),
        (lambda: consistency_loss(table(), Lookup(), torch.full((1, L), V), generator=rng()), "0 to 2"),
        (lambda: gibbs_block(table(), table().states, 0, generator=rng()), "from 1 to 4"),
    ],
)
def test_mistakes_are_explained(mistake, message):
    with pytest.raises(UserError, match=message):
        mistake()
