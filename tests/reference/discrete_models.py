"""Small exact models of token sequences that the discrete tests share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from distmatch.discrete import JointTable, Marginals, order_log_prob

V, L = 3, 4


def table(seed: int = 0, vocabulary: int = V, length: int = L) -> JointTable:
    """A random joint law, float64."""
    g = torch.Generator().manual_seed(seed)
    return JointTable(1.5 * torch.randn((vocabulary,) * length, generator=g, dtype=torch.float64))


class Lookup(nn.Module):
    """Arbitrary conditionals, one free number for each: they belong to no joint law."""

    def __init__(self, seed: int = 0, vocabulary: int = V, length: int = L) -> None:
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        g = torch.Generator().manual_seed(seed)
        size = ((vocabulary + 1) ** length, length, vocabulary)
        self.logits = nn.Parameter(1.5 * torch.randn(size, generator=g, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        places = (self.vocabulary + 1) ** torch.arange(self.length)
        return self.logits[(tokens * places).sum(1)]


class Uniform:
    """All symbols equally likely; remembers what it was asked."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.asked: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.asked.append(tokens.clone())
        return torch.zeros(*tokens.shape, self.vocabulary)


def all_orders(model: Lookup | JointTable, x: Tensor) -> Tensor:
    """log p(x) in each of the L! orders, (L!, B)."""
    orders = itertools.permutations(range(model.length))
    return torch.stack([order_log_prob(model, x, torch.tensor(o).expand_as(x)) for o in orders])


def brute_force_marginal(marginals: Marginals, tokens: Tensor) -> Tensor:
    """The log of the sum of p over all ways to fill the hidden tokens of one sequence."""
    free = (tokens == marginals.vocabulary).nonzero()[:, 0].tolist()
    ways = torch.tensor(list(itertools.product(range(marginals.vocabulary), repeat=len(free))))
    filled = tokens.repeat(len(ways), 1)
    filled[:, free] = ways.reshape(len(ways), len(free)).long()
    return marginals.log_marginal(filled).logsumexp(0)
