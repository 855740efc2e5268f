"""Samplers of absorbing diffusion: their law, their evaluations, their independence of how they are run."""

import math

import pytest
import torch
from scipy import stats

from distmatch.base.errors import UserError
from distmatch.discrete import (
    JointTable,
    exact_log_prob,
    forward_turns,
    mask_schedule,
    order_log_prob,
    sample_tokens,
)
from distmatch.discrete.sampling import _Choice, nucleus
from tests.reference.discrete_models import L, Lookup, Uniform, V, table

N = 12_000


def p_value(tokens: torch.Tensor, log_p: torch.Tensor) -> float:
    """Of Pearson's test that tokens (n, L) follow the law log_p over all states; rare states are one cell."""
    places = V ** torch.arange(L - 1, -1, -1)
    counts = torch.bincount((tokens * places).sum(1), minlength=V**L).double()
    expected = log_p.exp() * len(tokens)
    rare = expected < 5
    common = ~rare
    assert int(counts[expected == 0].sum()) == 0
    if float(expected[rare].sum()) > 5:
        counts = torch.cat([counts[common], counts[rare].sum()[None]])
        expected = torch.cat([expected[common], expected[rare].sum()[None]])
    else:
        counts, expected = counts[common], expected[common]
    return float(stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue)


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", ["any-order", "tweedie", "euler", "forward"])
def test_the_law_of_the_samples_is_the_joint_law(sampler):
    # 400 steps: two of the four tokens fall into the same step with probability 1.5%, which moves no cell by
    # more than a fraction of its standard error at this number of samples.
    model = table()
    steps = 400 if sampler in ("tweedie", "euler") else None
    drawn = sample_tokens(model, N, seed=1, sampler=sampler, steps=steps, schedule="cosine", batch=N)
    assert p_value(drawn.tokens, model.log_p) > 1e-3


@torch.no_grad()
def test_without_a_joint_law_the_order_matters_and_the_exact_likelihood_knows():
    model, states = Lookup(), table().states
    drawn = sample_tokens(model, N, seed=2, batch=N).tokens
    mixture = exact_log_prob(model, states)
    forward = order_log_prob(model, states, forward_turns(*states.shape))
    assert p_value(drawn, mixture) > 1e-3
    assert p_value(drawn, forward) < 1e-12
    assert p_value(sample_tokens(model, N, seed=2, sampler="forward", batch=N).tokens, forward) > 1e-3
    backward = (L - 1 - forward_turns(1, L)).expand(N, L)
    drawn = sample_tokens(model, N, seed=2, turns=backward, batch=N).tokens
    assert p_value(drawn, order_log_prob(model, states, backward[: len(states)])) > 1e-3


def test_one_step_draws_tokens_independently_and_more_steps_approach_the_joint_law():
    model = table()
    product = model(torch.full((1, L), V)).log_softmax(-1)[0]
    independent = product[torch.arange(L), model.states].sum(1)
    distances = []
    for steps in (1, 2, 8, 64):
        tokens = sample_tokens(model, N, seed=3, sampler="tweedie", steps=steps, batch=N).tokens
        counts = torch.bincount(model.code(tokens), minlength=V**L) / N
        distances.append(float((counts - model.log_p.exp()).abs().sum()) / 2)
        if steps == 1:
            assert p_value(tokens, independent) > 1e-3
            assert p_value(tokens, model.log_p) < 1e-12
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize(("steps", "length"), [(64, 100), (32, 8), (1, 5)])
def test_evaluations_of_a_sequence_follow_the_formula(steps, length):
    n = 1000
    drawn = sample_tokens(Uniform(2, length), n, seed=4, sampler="tweedie", steps=steps, batch=n)
    expected = steps * (1 - (1 - 1 / steps) ** length)
    spread = float(drawn.evaluations.double().std()) / math.sqrt(n)
    assert abs(drawn.nfe - expected) <= 4 * spread
    assert drawn.calls <= steps


@pytest.mark.parametrize(("sampler", "steps"), [("tweedie", 8), ("euler", 8)])
def test_tokens_are_hidden_for_as_long_as_the_schedule_says(sampler, steps):
    # Geometric: half of all steps reveal nearly nothing, unlike those of the log-linear schedule.
    n, length = 2000, 20
    model, schedule = Uniform(2, length), mask_schedule("geometric")
    sample_tokens(model, n, seed=8, sampler=sampler, steps=steps, schedule=schedule, cached=False, batch=n)
    hidden = torch.stack([(x == 2).double().mean() for x in model.asked])
    expected = torch.cat([torch.ones(1), (1 - schedule.hazards(steps, sampler)).cumprod(0)[:-1]])
    error = (expected * (1 - expected) / (n * length)).sqrt()
    assert bool(((hidden - expected).abs() <= 4 * error).all())
    assert float((expected - torch.linspace(1, 1 / steps, steps)).abs().max()) > 0.2


def test_evaluations_are_counted_as_they_happen():
    model = Uniform(2, 6)
    drawn = sample_tokens(model, 5, seed=0, sampler="tweedie", steps=10, batch=2)
    assert sum(map(len, model.asked)) == int(drawn.evaluations.sum())
    assert len(model.asked) == drawn.calls
    assert max(map(len, model.asked)) <= 2
    assert sample_tokens(model, 5, seed=0).evaluations.tolist() == [6] * 5
    full = sample_tokens(model, 5, seed=0, sampler="tweedie", steps=10, cached=False)
    assert full.evaluations.tolist() == [10] * 5


@pytest.mark.parametrize("sampler", ["tweedie", "any-order", "confidence"])
def test_samples_do_not_depend_on_the_cache_the_batch_or_the_number_drawn(sampler):
    model = table()
    steps = None if sampler == "any-order" else 6
    whole = sample_tokens(model, 50, seed=5, sampler=sampler, steps=steps)
    assert torch.equal(
        whole.tokens,
        sample_tokens(model, 50, seed=5, sampler=sampler, steps=steps, cached=False, batch=7).tokens,
    )
    fewer = sample_tokens(model, 13, seed=5, sampler=sampler, steps=steps)
    assert torch.equal(whole.tokens[:13], fewer.tokens)
    assert not torch.equal(
        whole.tokens, sample_tokens(model, 50, seed=6, sampler=sampler, steps=steps).tokens
    )


@pytest.mark.parametrize("sampler", ["any-order", "tweedie"])
def test_given_tokens_stay_and_the_rest_follows_the_conditional_law(sampler):
    model = table()
    given = torch.tensor([[V, 2, V, 0]])
    steps = 300 if sampler == "tweedie" else None
    drawn = sample_tokens(model, N, seed=7, sampler=sampler, steps=steps, given=given, batch=N)
    assert bool((drawn.tokens[:, [1, 3]] == torch.tensor([2, 0])).all())
    fits = (model.states[:, 1] == 2) & (model.states[:, 3] == 0)
    law = model.log_p.masked_fill(~fits, -math.inf)
    assert p_value(drawn.tokens, law - law.logsumexp(0)) > 1e-3
    assert int(drawn.evaluations.max()) <= 2
    nothing = sample_tokens(model, 3, seed=0, given=model.states[:3])
    assert torch.equal(nothing.tokens, model.states[:3])
    assert nothing.calls == 0


def test_confidence_reveals_the_surest_first_at_an_even_pace():
    class Graded(Uniform):
        """Position i is surer than position i - 1."""

        def __call__(self, tokens):
            logits = super().__call__(tokens)
            logits[..., 0] = 4 * torch.arange(1.0, tokens.shape[1] + 1)
            return logits

    model = Graded(3, 6)
    drawn = sample_tokens(model, 1, seed=0, sampler="confidence", steps=3)
    hidden = [(x[0] == 3).tolist() for x in model.asked]
    assert hidden == [[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert drawn.evaluations.tolist() == [3]
    assert bool((drawn.tokens < 3).all())


def test_more_steps_than_tokens_do_no_harm_to_confidence():
    drawn = sample_tokens(Uniform(3, 4), 6, seed=0, sampler="confidence", steps=9)
    assert bool((drawn.tokens < 3).all())


def test_symbols_are_drawn_by_inverse_cdf_in_float64():
    log_c = torch.log(torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]))
    choice = _Choice(1.0, 1.0)
    u = torch.tensor([0.0, 0.2499999, 0.2500001, 1 - 2.0**-53], dtype=torch.float64)
    assert choice(log_c.expand(4, 5), u).tolist() == [1, 1, 3, 3]
    # A probability of 1e-12 is drawn by u below it, which float32 uniforms (steps of 6e-8) almost never are.
    tiny = torch.tensor([1e-12, 1.0])
    below_and_above = torch.tensor([0.9e-12, 1.1e-12], dtype=torch.float64)
    assert choice(tiny.log().expand(2, 2), below_and_above).tolist() == [0, 1]
    # The same at the upper end, where float32 sums up to 1 before the rare symbol is added.
    tail = torch.tensor([1 - 0.5e-12, 1 - 1.5e-12], dtype=torch.float64)
    assert choice(tiny.flip(0).log().expand(2, 2), tail).tolist() == [1, 0]
    # p^(1/T): temperature 1/2 squares the odds.
    squared = _Choice(0.5, 1.0)(log_c.expand(2, 5), torch.tensor([0.0999, 0.1001], dtype=torch.float64))
    assert squared.tolist() == [1, 3]


def test_the_nucleus_is_the_smallest_set_and_sums_to_one():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert torch.allclose(nucleus(p, 0.7), torch.tensor([[0, 2 / 3, 0, 1 / 3]], dtype=torch.float64))
    assert torch.equal(nucleus(p, 0.5), torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64))
    assert torch.equal(nucleus(p, 1e-9), torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64))
    assert torch.allclose(nucleus(p, 1.0), p)


def test_a_schedule_object_is_taken_too():
    a = sample_tokens(table(), 20, seed=0, sampler="tweedie", steps=3, schedule=mask_schedule("cosine"))
    b = sample_tokens(table(), 20, seed=0, sampler="tweedie", steps=3, schedule="cosine")
    assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "gibbs"}, "any-order"),
        ({"sampler": "tweedie"}, "number of steps"),
        ({"steps": 5}, "one token at a time"),
        ({"sampler": "tweedie", "steps": 0}, "positive whole number"),
        ({"n": 0}, "positive whole number"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"given": torch.full((1, L), V + 1)}, "hides a token"),
        ({"given": torch.full((3, L), V)}, "1 or 2"),
        ({"sampler": "forward", "turns": forward_turns(2, L)}, "any-order"),
        ({"turns": forward_turns(2, L - 1)}, "turns"),
        ({"turns": forward_turns(2, L) - 1}, "numbers from 0"),
        ({"sampler": "tweedie", "steps": 4, "schedule": "linear"}, "log-linear"),
    ],
)
def test_mistakes_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        sample_tokens(JointTable(torch.zeros((V,) * L)), **{"n": 2, "seed": 0, **settings})
