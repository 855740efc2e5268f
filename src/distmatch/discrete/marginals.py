"""Marginalization models (MaM, 2310.12920): the probability of any set of tokens in one evaluation.

A network of marginals and one of conditionals agree when log p(x_S, x_i) = log p(x_S) + log c(x_i | x_S) for
all sets S and positions i outside; then the first one is normalized as soon as p(nothing visible) = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_equal
from distmatch.discrete.likelihood import all_hidings
from distmatch.discrete.losses import stratified
from distmatch.discrete.orders import random_turns
from distmatch.discrete.tokens import Conditionals, Marginals, check_tokens, log_conditionals, picked


def consistency_loss(
    marginals: Marginals, conditionals: Conditionals, x: Tensor, *, generator: torch.Generator
) -> Tensor:
    """How much the two networks disagree on one step of a random order: zero exactly when they agree.

    L (log p(x of the first d) - log p(x of the first d - 1) - log c(x of turn d | those before))^2
    + (log p(nothing visible))^2, with d stratified over the batch and uniform on 1 .. L.

    Args:
        marginals: log p of sets of tokens.
        conditionals: log c of a token given a set.
        x: Complete sequences (B, L), from the distribution where agreement matters.
        generator: Random stream, on any device.

    Returns:
        (B,), nats squared. Gradients flow into both networks.

    Raises:
        UserError: The networks are of other sizes, or unsuitable sequences.
    """
    check_tokens(x, marginals, hidden=False)
    check_pair(marginals, conditionals)
    length, hidden = marginals.length, marginals.vocabulary
    turns = random_turns(len(x), length, generator).to(x.device)
    count = (stratified(len(x), generator) * length).ceil().to(x.device)[:, None]
    before = x.masked_fill(turns >= count - 1, hidden)
    after = x.masked_fill(turns >= count, hidden)
    nothing = torch.full_like(x[:1], hidden)
    log_p = marginals.log_marginal(torch.cat([after, before, nothing]))
    log_after, log_before, log_nothing = log_p.split([len(x), len(x), 1])
    log_c = picked(log_conditionals(conditionals, before), x)
    step = log_c.masked_fill(turns != count - 1, 0.0).sum(1)
    return length * (log_after - log_before - step) ** 2 + log_nothing**2


def reinforce_loss(
    marginals: Marginals, log_f: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """A surrogate whose gradient estimates that of KL(p || f / Z), for ``x`` drawn from p.

    grad KL = E_p[(log p - log f - baseline) grad log p]. The baseline is the batch mean; the advantage is
    divided by its standard deviation where that is above 1 nat, so that early steps are bounded and the last
    ones still shrink with the error.

    Args:
        marginals: log p of whole sequences.
        log_f: Sequences (B, L) -> log of the unnormalized density, (B,) in nats.
        x: Sequences from the model.

    Returns:
        The surrogate, a scalar to differentiate, and log p - log f (B,) detached; minus its mean estimates
        log Z from below.
    """
    log_p = marginals.log_marginal(x)
    with torch.no_grad():
        gap = log_p - log_f(x)
    advantage = (gap - gap.mean()) / gap.std().clamp_min(1.0)
    return (advantage * log_p).mean(), gap


@torch.no_grad()
def gibbs_block(conditionals: Conditionals, x: Tensor, block: int, *, generator: torch.Generator) -> Tensor:
    """One sweep of block Gibbs: hides ``block`` random tokens of each row and draws them anew one at a time.

    Args:
        conditionals: What the tokens are drawn from.
        x: Whole sequences (B, L).
        block: Tokens drawn anew, 1 to L; as many evaluations.
        generator: Random stream on the device of ``x``.

    Returns:
        (B, L). If ``x`` follows the distribution of exact conditionals, so does the result.

    Raises:
        UserError: A block that is empty or longer than a sequence.
    """
    length = conditionals.length
    check_count("the block", block, 1, length)
    turns = random_turns(len(x), length, generator).to(x.device)
    x = x.masked_fill(turns < block, conditionals.vocabulary)
    for turn in range(block):
        log_c = log_conditionals(conditionals, x).to(torch.float64)
        u = torch.rand(log_c.shape, generator=generator, device=generator.device, dtype=torch.float64)
        # The largest of log c + Gumbel noise; in float64, where the noise reaches far enough into its tail.
        drawn = (log_c - torch.log(-torch.log(u.to(x.device)))).argmax(-1)
        x = torch.where(turns == turn, drawn, x)
    return x


def inequality_violation(marginals: Marginals, x: Tensor) -> Tensor:
    """Largest log p(x_S and x_i) - log p(x_S) over sets S and i outside, (B,); ideally at most 0.

    Raises:
        UserError: More than 12 tokens, or unsuitable sequences.
    """
    check_tokens(x, marginals, hidden=False)
    sets = all_hidings(x)
    tokens = x[:, None].masked_fill(sets, marginals.vocabulary)
    log_p = marginals.log_marginal(tokens.flatten(0, 1)).unflatten(0, (len(x), len(sets)))
    codes = torch.arange(len(sets), device=x.device)
    # Set number m hides the bits of m: without bit i, it shows token i besides what m shows.
    rises = [log_p[:, codes & ~(1 << i)] - log_p for i in range(x.shape[1])]
    outside = [(codes >> i & 1 == 1).expand_as(log_p) for i in range(x.shape[1])]
    masked = [r.masked_fill(~o, float("-inf")) for r, o in zip(rises, outside, strict=True)]
    return torch.stack(masked).amax((0, 2))


def check_pair(marginals: Marginals, conditionals: Conditionals) -> None:
    """Refuses networks of different sizes.

    Raises:
        UserError: Vocabulary or length differ.
    """
    sizes = [(model.vocabulary, model.length) for model in (marginals, conditionals)]
    check_equal("the vocabularies and lengths of marginals and conditionals", *sizes)
