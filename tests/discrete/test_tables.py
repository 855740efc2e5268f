"""Discrete diffusion: exact tables, schedules, likelihoods, refusals."""

import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.discrete import (
    JointTable,
    MarginalNet,
    TokenNet,
    TokenNetConfig,
    discrete_loss,
    exact_bound,
    exact_log_prob,
    forward_turns,
    mask_schedule,
    nll_bound,
    order_log_prob,
    random_turns,
    sequence_bound,
)
from distmatch.discrete.schedules import SCHEDULES, cosine, geometric, log_linear
from distmatch.discrete.tokens import log_conditionals
from tests.reference.discrete_models import L, Lookup, Uniform, V, all_orders, table


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Short(Uniform):
    """Forgets the last position."""

    def __call__(self, tokens):
        return super().__call__(tokens)[:, :-1]


def test_conditionals_and_marginals_of_a_table_are_sums_over_its_entries():
    model = table()
    p = model.log_p.exp().reshape((V,) * L)
    tokens = torch.tensor([[2, V, 1, V], [V, V, V, V]])
    c = log_conditionals(model, tokens).exp()
    seen = p[2, :, 1, :]
    assert torch.allclose(c[0, 1], seen.sum(1) / seen.sum(), atol=1e-14)
    assert torch.allclose(c[0, 3], seen.sum(0) / seen.sum(), atol=1e-14)
    assert torch.allclose(c[1, 2], p.sum((0, 1, 3)), atol=1e-14)
    assert torch.allclose(model.log_marginal(tokens).exp(), torch.tensor([seen.sum(), 1.0]), atol=1e-14)
    assert torch.equal(model.code(model.states), torch.arange(V**L))


def test_a_table_with_zeros_has_conditionals_without_nan():
    log_p = torch.full((2, 2), -math.inf, dtype=torch.float64)
    log_p[0, 1] = log_p[1, 0] = 0.0
    c = log_conditionals(JointTable(log_p), torch.tensor([[0, 2], [2, 2]])).exp()
    assert c[0, 1].tolist() == [0.0, 1.0]
    assert torch.allclose(c[1], torch.full((2, 2), 0.5, dtype=torch.float64))


def test_chain_rule_is_the_joint_in_every_order_when_conditionals_are_exact():
    model = table()
    by_order = all_orders(model, model.states)
    assert torch.allclose(by_order, model.log_p.expand_as(by_order), atol=1e-12)


def test_forward_order_is_the_autoregressive_chain_rule():
    model, x = Lookup(), table().states[::7]
    by_hand = torch.zeros(len(x), dtype=torch.float64)
    for i in range(L):
        seen = x.clone()
        seen[:, i:] = V
        by_hand += model(seen)[:, i].log_softmax(-1).gather(1, x[:, i : i + 1])[:, 0]
    assert torch.allclose(order_log_prob(model, x, forward_turns(*x.shape)), by_hand, atol=1e-12)


@torch.no_grad()
def test_exact_bound_and_exact_likelihood_are_averages_over_orders():
    # Conditionals of no joint law: the two averages differ, and each must be the right one.
    model, x = Lookup(), table().states
    by_order = all_orders(model, x)
    assert torch.allclose(exact_bound(model, x), -by_order.mean(0), atol=1e-12)
    mixture = by_order.logsumexp(0) - math.log(len(by_order))
    assert torch.allclose(exact_log_prob(model, x), mixture, atol=1e-12)
    assert abs(float(exact_log_prob(model, x).exp().sum()) - 1) < 1e-12
    assert bool((exact_bound(model, x) > -mixture).all())


@pytest.mark.statistical
@torch.no_grad()
def test_bounds_with_error_bars_cover_the_exact_bound():
    model, x = Lookup(), table().sample(400, rng())
    truth = exact_bound(model, x)
    for whole in (False, True):
        value, stderr = sequence_bound(model, x, 64, generator=rng(1), whole_orders=whole)
        z = (value - truth) / stderr
        assert float(z.abs().max()) < 6  # 400 near-Student values with 63 degrees of freedom
        assert 0.8 < float(z.std()) < 1.25
    # Given the sequences, what is left of the error is that of the draws, which is the smaller part.
    estimate = nll_bound(model, x, 8, generator=rng(2), batch=150)
    assert abs(estimate.value - float(truth.mean()) / L) < 4 * estimate.stderr
    assert estimate.stderr > 0.9 * float(truth.std()) / L / math.sqrt(len(x))
    assert estimate.n == 400


@pytest.mark.parametrize(
    "schedule", [log_linear(0.02), cosine(0.01), geometric(1e-3, 8.0)], ids=lambda s: s.name
)
def test_schedules_have_the_right_rate_and_inverse(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.total(t).sum(), t)
    assert torch.allclose(schedule.rate(t), slope, rtol=1e-10)
    assert torch.allclose(schedule.time(schedule.total(t)), t, atol=1e-9)
    assert torch.allclose(schedule.hidden(t), 1 - torch.exp(-schedule.total(t)), atol=1e-14)


def test_the_default_schedule_is_the_one_of_the_paper():
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.allclose(mask_schedule("log-linear").total(t), -torch.log(1 - (1 - 1e-3) * t), atol=1e-15)
    assert [mask_schedule(name).name for name in SCHEDULES] == list(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_steps_leave_hidden_what_the_process_leaves_hidden(name):
    schedule, steps = mask_schedule(name), 16
    hidden = schedule.hidden(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    left = (1 - schedule.hazards(steps)).cumprod(0)
    assert torch.allclose(left[:-1], hidden[1:-1] / hidden[0], atol=1e-12)
    assert left[-1] == 0
    # Euler's rule approaches the same numbers, with error 1/steps.
    errors = [
        float(
            ((1 - schedule.hazards(n, "euler")).cumprod(0) - (1 - schedule.hazards(n)).cumprod(0)).abs().max()
        )
        for n in (200, 400)
    ]
    if name == "log-linear":
        assert max(errors) < 1e-12
    else:
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_a_network_shows_its_shapes_and_starts_uniform():
    config = TokenNetConfig(vocabulary=5, length=7, width=16, depth=2, heads=2)
    tokens = torch.randint(6, (3, 7), generator=rng())
    assert torch.equal(TokenNet(config)(tokens), torch.zeros(3, 7, 5))
    visible = (tokens < 5).sum(1)
    assert torch.allclose(MarginalNet(config).log_marginal(tokens), -visible * math.log(5), atol=1e-5)
    assert MarginalNet(config)(torch.full((1, 7), 5)).item() == 0


@torch.no_grad()
def test_a_network_reads_all_visible_tokens_and_their_places():
    net = TokenNet(TokenNetConfig(vocabulary=5, length=21, width=16, depth=2, heads=2))
    for parameter in net.parameters():
        parameter.normal_(std=0.3, generator=rng(1))
    tokens = torch.full((1, 21), 5)
    far, moved = tokens.clone(), tokens.clone()
    far[0, 20], moved[0, 18] = 2, 2
    nothing, one, other = (net(x)[0] for x in (tokens, far, moved))
    # Position 10 is out of reach of the convolutions, of these tokens and of the ends alike.
    assert float((nothing[10] - one[10]).abs().max()) > 1e-3
    assert float((one[10] - other[10]).abs().max()) > 1e-3
    assert float((nothing[10] - nothing[11]).abs().max()) > 1e-2


def test_random_turns_are_uniform_over_permutations():
    codes = (random_turns(24_000, 4, rng()) * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 23 + 5 * math.sqrt(46)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: discrete_loss(Uniform(3, 4), torch.zeros(2, 5, dtype=torch.int64), generator=rng()),
            "(B, 4)",
        ),
        (lambda: discrete_loss(Uniform(3, 4), torch.zeros(2, 4), generator=rng()), "int64"),
        (lambda: discrete_loss(Uniform(3, 4), torch.full((2, 4), 3), generator=rng()), "0 to 2"),
        (lambda: discrete_loss(Uniform(3, 4), torch.zeros(1, 4).long(), "k-dse", generator=rng()), "k-dce"),
        (
            lambda: discrete_loss(
                Uniform(3, 4), torch.zeros(1, 4).long(), "t-dce", generator=rng(), cutoff=1.0
            ),
            "cutoff",
        ),
        (lambda: mask_schedule("log_linear"), "log-linear"),
        (lambda: log_linear(0.0), "floor"),
        (lambda: geometric(1.0, 0.5), "low < high"),
        (lambda: mask_schedule("cosine").hazards(0), "number of steps"),
        (lambda: mask_schedule("cosine").hazards(3, "heun"), "tweedie"),
        (lambda: JointTable(torch.zeros(2, 3)), "vocabulary"),
        (lambda: JointTable(torch.full((2, 2), math.nan)), "not a distribution"),
        (lambda: JointTable(torch.full((2, 2), -math.inf)), "not a distribution"),
        (lambda: JointTable(torch.zeros((2,) * 21)), "number of states"),
        (lambda: exact_bound(Uniform(2, 13), torch.zeros(1, 13).long()), "2^L"),
        (lambda: sequence_bound(Uniform(2, 3), torch.zeros(1, 3).long(), 1, generator=rng()), "of draws"),
        (lambda: nll_bound(Uniform(2, 3), torch.zeros(1, 3).long(), generator=rng()), "2 sequences"),
        (lambda: order_log_prob(Uniform(2, 3), torch.zeros(1, 3).long(), torch.zeros(1, 3).long()), "permut"),
        (lambda: log_conditionals(Short(2, 3), torch.zeros(1, 3).long()), "another shape"),
        (lambda: TokenNetConfig(vocabulary=3, length=4, width=10, heads=4), "divide"),
        (lambda: TokenNetConfig(vocabulary=0, length=4), "positive"),
    ],
)
def test_mistakes_are_explained(mistake, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)").replace("^", r"\^")):
        mistake()
