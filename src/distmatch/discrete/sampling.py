"""Sampling by revealing hidden tokens; the evaluations of the network are counted.

In an absorbing process, when a token is revealed does not depend on what it is. So all turns are drawn
first, and the network is evaluated only for the sequences that reveal something in a turn: what the cache of
RADD (2406.03736) saves, without keeping outputs. With the log-linear schedule, N steps and L tokens, a
sequence needs N (1 - (1 - 1/N)^L) evaluations on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name, check_number
from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.discrete.orders import forward_turns, random_turns
from distmatch.discrete.schedules import MaskSchedule, mask_schedule
from distmatch.discrete.tokens import Conditionals, check_tokens, log_conditionals

SAMPLERS = ("tweedie", "euler", "any-order", "forward", "confidence")


@dataclass(frozen=True)
class DiscreteSamples:
    """What :func:`sample_tokens` returns.

    Attributes:
        tokens: The sequences (n, L) int64.
        evaluations: Times that each sequence went through the network, (n,) int64 on the CPU.
        calls: Calls of the network, whatever the number of sequences in one.
    """

    tokens: Tensor
    evaluations: Tensor
    calls: int

    @property
    def nfe(self) -> float:
        """Mean network evaluations for a sequence."""
        return float(self.evaluations.double().mean())


@dataclass(frozen=True)
class _Choice:
    """How a symbol is drawn from the conditionals."""

    temperature: float
    top_p: float

    def __call__(self, log_c: Tensor, u: Tensor) -> Tensor:
        """Inverse CDF of the float64 distribution of ``log_c`` (..., V) at uniforms ``u`` (...)."""
        log_p = torch.log_softmax(log_c.to(torch.float64) / self.temperature, dim=-1)
        p = log_p.exp()
        if self.top_p < 1:
            p = nucleus(p, self.top_p)
        # Scaled by the total, the draw cannot fall behind the last symbol, nor on one of probability zero.
        edges = p.cumsum(-1)
        return torch.searchsorted(edges, (u[..., None] * edges[..., -1:]), right=True)[..., 0]


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Keeps the most probable symbols whose probabilities first reach ``top_p``; normalized again."""
    ordered, place = p.sort(dim=-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(p).scatter(-1, place, kept / kept.sum(-1, keepdim=True))


@torch.no_grad()
def sample_tokens(
    model: Conditionals,
    n: int,
    *,
    seed: int,
    sampler: str = "any-order",
    steps: int | None = None,
    schedule: str | MaskSchedule = "log-linear",
    given: Tensor | None = None,
    turns: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    cached: bool = True,
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> DiscreteSamples:
    """Draws sequences, or completes given ones.

    Row i depends on the seed and on i alone, not on how many sequences are drawn or on ``cached``.

    Args:
        model: The conditionals.
        n: Number of sequences.
        seed: Seed of the draw.
        sampler: ``tweedie`` or ``euler``: ``steps`` steps of the process with ``schedule``, tokens of one
            step drawn independently; ``any-order``: one at a time in random order, or in ``turns``;
            ``forward``: left to right; ``confidence``: each step reveals those drawn with the largest
            probability, which favors likely sequences and does not sample the distribution of the model.
        steps: For tweedie, euler and confidence.
        schedule: For tweedie and euler: how fast tokens are hidden.
        given: Sequences (n, L) or (1, L) in which the hidden symbol marks what is to be drawn.
        turns: For any-order: (n, L), the turn of each position; equal turns are drawn together.
        temperature: Divides the logits.
        top_p: Smallest share of probability kept; 1 keeps all.
        cached: False evaluates every sequence in every step, as a process without a cache does.
        batch: Sequences in one call of the network.
        device: Device of the network.

    Raises:
        UserError: An unknown sampler, steps missing or superfluous, or unsuitable sequences.
    """
    _check(n, sampler, steps, temperature, top_p, batch, turns)
    length, hidden_symbol = model.length, model.vocabulary
    start = _start(model, n, given)
    random = generator(seed, "discrete/turns")
    u = torch.rand(n, length, generator=generator(seed, "discrete/values"), dtype=torch.float64).to(device)
    choice = _Choice(temperature, top_p)
    if sampler == "confidence":
        return _by_confidence(model, start.to(device), steps or 1, u, choice, batch)
    if sampler in ("tweedie", "euler"):
        hazards = mask_schedule(schedule).hazards(steps or 1, sampler)
        still = (1 - hazards).cumprod(0)  # probability to be hidden after each step
        draw = torch.rand(n, length, generator=random, dtype=torch.float64)
        plan = torch.searchsorted(-still, -draw)
        count = len(hazards)
    else:
        if turns is not None:
            plan = turns.to(device="cpu", dtype=torch.int64)
        elif sampler == "forward":
            plan = forward_turns(n, length)
        else:
            plan = random_turns(n, length, random)
        if plan.shape != start.shape or int(plan.min()) < 0:
            raise UserError(
                "the turns do not match the sequences",
                got=f"shape {tuple(plan.shape)}",
                expected=f"numbers from 0 of shape {tuple(start.shape)}",
            )
        count = int(plan.max()) + 1
    plan = plan.masked_fill(start != hidden_symbol, -1)
    return _reveal(model, start, plan, count, u, choice, cached, batch)


def _reveal(
    model: Conditionals,
    start: Tensor,
    plan: Tensor,
    count: int,
    u: Tensor,
    choice: _Choice,
    cached: bool,
    batch: int,
) -> DiscreteSamples:
    """Reveals ``start`` in the turns of ``plan``, both on the CPU: no turn waits for the device."""
    tokens = start.to(u.device)
    evaluations = torch.zeros(len(start), dtype=torch.int64)
    calls = 0
    for turn in range(count):
        now = plan == turn
        reveals = now.any(1) if cached else torch.ones(len(start), dtype=torch.bool)
        rows = reveals.nonzero()[:, 0]
        evaluations[rows] += 1
        for part in rows.split(batch) if len(rows) else ():
            calls += 1
            row, place = now[part].nonzero().to(u.device).unbind(1)
            index = part.to(u.device)
            log_c = log_conditionals(model, tokens[index])[row, place]
            at = (index[row], place)
            tokens[at] = choice(log_c, u[at])
    return DiscreteSamples(tokens, evaluations, calls)


def _by_confidence(
    model: Conditionals, tokens: Tensor, steps: int, u: Tensor, choice: _Choice, batch: int
) -> DiscreteSamples:
    """As many tokens in each step as :func:`~torch.linspace` gives, the surest of those drawn first."""
    hidden = tokens == model.vocabulary
    free = hidden.sum(1)
    calls = 0
    for step in range(steps):
        # Of the free tokens, those that stay hidden after this step.
        left = torch.div(free * (steps - 1 - step), steps, rounding_mode="floor")
        parts = []
        for rows, uniforms in zip(tokens.split(batch), u.split(batch), strict=True):
            calls += 1
            log_c = log_conditionals(model, rows)
            drawn = choice(log_c, uniforms)
            parts.append((drawn, log_c.gather(-1, drawn[..., None])[..., 0]))
        drawn, sure = torch.cat([d for d, _ in parts]), torch.cat([s for _, s in parts])
        rank = sure.masked_fill(~hidden, float("-inf")).argsort(1, descending=True).argsort(1)
        reveal = hidden & (rank < (hidden.sum(1) - left)[:, None])
        tokens = torch.where(reveal, drawn, tokens)
        hidden = hidden & ~reveal
    return DiscreteSamples(tokens, torch.full((len(tokens),), steps), calls)


def _start(model: Conditionals, n: int, given: Tensor | None) -> Tensor:
    if given is None:
        return torch.full((n, model.length), model.vocabulary)
    given = given.cpu()
    check_tokens(given, model, hidden=True, what="the given tokens")
    if len(given) not in (1, n):
        raise UserError("the number of given sequences does not match", got=len(given), expected=f"1 or {n}")
    return given.expand(n, -1).clone()


def _check(
    n: int,
    sampler: str,
    steps: int | None,
    temperature: float,
    top_p: float,
    batch: int,
    turns: Tensor | None,
) -> None:
    check_name("discrete sampler", sampler, SAMPLERS)
    stepwise = sampler in ("tweedie", "euler", "confidence")
    if stepwise != (steps is not None):
        raise UserError(
            f"the sampler {sampler} "
            + ("needs a number of steps" if stepwise else "takes one token at a time"),
            got=f"steps={steps}",
            fix="give steps=64, for example" if stepwise else "omit steps, or choose sampler='tweedie'",
        )
    if turns is not None and sampler != "any-order":
        raise UserError("turns belong to the sampler any-order", got=f"sampler={sampler!r}")
    for name, value in (("n", n), ("batch", batch), ("steps", 1 if steps is None else steps)):
        check_count(name, value)
    check_number("the temperature", temperature, "(0, inf)")
    check_number("top_p", top_p, "(0, 1]")
