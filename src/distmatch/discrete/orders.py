"""Orders in which tokens are revealed, as turns: position i of a sequence has its turn at ``turns[i]``."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.discrete.tokens import Conditionals, check_tokens, log_conditionals


def random_turns(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orders (n, length) int64, each row a permutation of 0 .. length - 1."""
    u = torch.rand(n, length, generator=generator, device=generator.device, dtype=torch.float64)
    return u.argsort(dim=1).argsort(dim=1)


def forward_turns(n: int, length: int) -> Tensor:
    """Left to right, (n, length) int64."""
    return torch.arange(length).expand(n, length)


def order_log_prob(model: Conditionals, x: Tensor, turns: Tensor) -> Tensor:
    """The log-probability of x by the chain rule in the given orders, L evaluations.

    Args:
        model: The conditionals.
        x: Sequences (B, L), nothing hidden.
        turns: Orders (B, L); each row a permutation of 0 .. L - 1.

    Returns:
        (B,) in nats.

    Raises:
        UserError: ``x`` or ``turns`` are not what they should be.
    """
    check_tokens(x, model, hidden=False)
    check_turns(turns, x)
    turns = turns.to(x.device)
    total = torch.zeros(len(x), device=x.device)
    for turn in range(x.shape[1]):
        log_c = log_conditionals(model, x.masked_fill(turns >= turn, model.vocabulary))
        at = (turns == turn).to(torch.int64).argmax(dim=1)
        rows = torch.arange(len(x), device=x.device)
        total = total + log_c[rows, at, x[rows, at]]
    return total


def check_turns(turns: Tensor, x: Tensor) -> None:
    """Refuses turns of another shape than ``x``, and, on the CPU, rows that are no permutation.

    Raises:
        UserError: Wrong shape or values.
    """
    wrong = turns.shape != x.shape
    if not wrong and turns.device.type == "cpu":
        wrong = not torch.equal(turns.sort(dim=1).values, forward_turns(*turns.shape))
    if wrong:
        raise UserError(
            "the orders do not match the sequences",
            got=f"turns of shape {tuple(turns.shape)}",
            expected=f"shape {tuple(x.shape)}, each row a permutation of 0 .. {x.shape[1] - 1}",
            fix="turns = order.argsort(dim=1) where order lists the positions as they are revealed",
        )
