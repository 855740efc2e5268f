"""Likelihoods of models of conditionals: the any-order bound with its error; exact sums for short ones.

A model that is not consistent gives another p(x) in each order. What sampling in a random order produces is
the mixture over orders, p(x) = E_order p_order(x); the bound is E_order of -log p_order(x) >= -log p(x).
They are equal where the conditionals belong to one joint distribution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate, mean_of
from distmatch.discrete.losses import hidden_nll, hide_count
from distmatch.discrete.orders import order_log_prob, random_turns
from distmatch.discrete.tokens import Conditionals, check_tokens, log_conditionals, picked

_LONGEST = 12


@torch.no_grad()
def sequence_bound(
    model: Conditionals, x: Tensor, draws: int = 16, *, generator: torch.Generator, whole_orders: bool = False
) -> tuple[Tensor, Tensor]:
    """The bound on -log p(x) of each sequence by itself.

    Args:
        model: The conditionals.
        x: Sequences (B, L).
        draws: Independent draws, at least 2.
        generator: Random stream, on any device.
        whole_orders: Draw whole random orders (L evaluations each, much less spread) instead of numbers of
            hidden tokens (1 evaluation each).

    Returns:
        Mean and its standard error over the draws, (B,) each, in nats per sequence.

    Raises:
        UserError: Fewer than 2 draws, or unsuitable sequences.
    """
    check_tokens(x, model, hidden=False)
    check_count("the number of draws", draws, 2, fix="an error bar needs two")
    length = x.shape[1]
    values = []
    for _ in range(draws):
        if whole_orders:
            values.append(-order_log_prob(model, x, random_turns(len(x), length, generator)))
        else:
            count = torch.randint(1, length + 1, (len(x),), generator=generator, device=generator.device)
            values.append(
                hidden_nll(model, x, hide_count(x, count, generator)) * (length / count).to(x.device)
            )
    table = torch.stack(values).to(torch.float64)
    return table.mean(0), table.std(0) / math.sqrt(draws)


@torch.no_grad()
def nll_bound(
    model: Conditionals, x: Tensor, draws: int = 4, *, generator: torch.Generator, batch: int = 256
) -> Estimate:
    """The bound on -log p for the distribution that the sequences come from, in nats per token.

    Numbers of hidden tokens are stratified over the ``draws`` of one sequence, so the draws of a sequence
    depend on each other while sequences are independent: the error is taken over the sequences and holds both
    their spread and that of the draws.

    Args:
        model: The conditionals.
        x: Independent sequences (n, L), at least 2.
        draws: Evaluations for each sequence.
        generator: Random stream, on any device.
        batch: Sequences evaluated at once.

    Raises:
        UserError: Fewer than 2 sequences, no draw, or unsuitable sequences.
    """
    check_tokens(x, model, hidden=False)
    if len(x) < 2 or draws < 1:
        raise UserError(
            "the bound needs at least 2 sequences and 1 draw", got=f"{len(x)} sequences and {draws} draws"
        )
    length = x.shape[1]
    means = []
    for rows in x.split(batch):
        # Each sequence has its own offset; the draws of one sequence are equally far apart.
        offset = torch.rand(len(rows), generator=generator, device=generator.device, dtype=torch.float64)
        total = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
        for draw in range(draws):
            u = 1 - (offset + draw / draws).remainder(1)
            count = (u * length).ceil()
            total += hidden_nll(model, rows, hide_count(rows, count, generator)) / count.to(x.device)
        means.append(total / draws)
    values = torch.cat(means)
    return mean_of(values)


def all_hidings(x: Tensor) -> Tensor:
    """Every set of hidden positions of a short sequence, (2^L, L) bool; set number m hides the bits of m."""
    length = x.shape[1]
    if length > _LONGEST:
        raise UserError(
            "exact sums visit all 2^L sets of tokens",
            got=f"L = {length}",
            expected=f"L <= {_LONGEST}",
            fix="use sequence_bound for longer sequences",
        )
    codes = torch.arange(2**length, device=x.device)
    return (codes[:, None] >> torch.arange(length, device=x.device)) % 2 == 1


def _all_terms(model: Conditionals, x: Tensor) -> Tensor:
    """Terms log c(x_i | visible) for all sets of hidden positions, (B, 2^L, L), 0 where i is visible."""
    sets = all_hidings(x)
    tokens = x[:, None].expand(-1, len(sets), -1)
    log_c = log_conditionals(model, tokens.masked_fill(sets, model.vocabulary).flatten(0, 1))
    return picked(log_c, tokens.flatten(0, 1)).unflatten(0, (len(x), len(sets))).masked_fill(~sets, 0.0)


def exact_bound(model: Conditionals, x: Tensor) -> Tensor:
    """The bound itself, (B,) in nats per sequence: the mean over all sets of hidden tokens, 2^L evaluations.

    Averaging the k-DCE over k and over the sets of k gives B(x) = sum over sets of -sum log c / (k C(L, k)).

    Raises:
        UserError: More than 12 tokens, or unsuitable sequences.
    """
    check_tokens(x, model, hidden=False)
    length = x.shape[1]
    counts = all_hidings(x).sum(1).tolist()
    weights = [1 / (k * math.comb(length, k)) if k else 0.0 for k in counts]
    terms = _all_terms(model, x)
    return -(terms.sum(-1) @ torch.tensor(weights, dtype=terms.dtype, device=x.device))


def exact_log_prob(model: Conditionals, x: Tensor) -> Tensor:
    """The log of the mean over all orders of p_order(x), (B,): exact for the any-order sampler.

    Sums over subsets: A(S) = mean over i in S of A(S without i) c(x_i | x of S without i) is the probability
    of the tokens in S averaged over their orders, and A(all) is wanted; 2^L evaluations instead of L! orders.

    Raises:
        UserError: More than 12 tokens, or unsuitable sequences.
    """
    check_tokens(x, model, hidden=False)
    length = x.shape[1]
    terms = _all_terms(model, x)
    everything = 2**length - 1
    # Visible sets by their bits; those with k tokens are all done before those with k + 1.
    log_a: list[Tensor] = [torch.zeros(len(x), dtype=terms.dtype, device=x.device)] * (everything + 1)
    for visible in sorted(range(1, everything + 1), key=int.bit_count):
        members = [i for i in range(length) if visible >> i & 1]
        ways = [log_a[visible ^ 1 << i] + terms[:, everything ^ visible ^ 1 << i, i] for i in members]
        log_a[visible] = torch.stack(ways).logsumexp(0) - math.log(len(members))
    return log_a[everything]
