"""Four losses whose mean is the same bound on -log p, in nats per sequence (RADD, 2406.03736).

With M hidden tokens and c the model's conditionals, each term below is an unbiased estimate of the bound
B(x) = E over random orders of the sum of -log c(next token | tokens before it):

    t-DSE       s' times the score entropy of the concrete scores, at a random time
    t-DCE       s' / (e^s - 1) sum over hidden -log c, at a random time
    lambda-DCE  (1 / lambda) sum over hidden -log c, lambda uniform on (0, 1]
    k-DCE       (L / k) sum over hidden -log c, k uniform on 1 .. L, k tokens hidden

The losses in t omit the times before a cutoff and the noise that the schedule does not reach; the other two
omit nothing. The fifth, AO-ARM, is the bound's own definition with one random order: L evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.base.checks import check_name, check_number
from distmatch.discrete.orders import order_log_prob, random_turns
from distmatch.discrete.schedules import MaskSchedule, mask_schedule
from distmatch.discrete.tokens import Conditionals, check_tokens, log_conditionals, picked

LOSSES = ("t-dse", "t-dce", "lambda-dce", "k-dce", "ao-arm")


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """``n`` uniforms on (0, 1], one in each n-th of the interval, each by itself uniform.

    The low-discrepancy draw of variational diffusion models (Kingma et al. 2021, appendix I.1).

    Returns:
        (n,) float64 on the generator's device.
    """
    offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    steps = torch.arange(n, device=generator.device, dtype=torch.float64) / n
    return 1 - (offset + steps).remainder(1)


def hide_share(x: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
    """Which tokens are hidden, (B, L) bool, each one by itself with probability ``share`` (B,)."""
    u = torch.rand(x.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return u.to(x.device) < share.to(x.device)[:, None]


def hide_count(x: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Which tokens are hidden, (B, L) bool: ``count`` (B,) in each row, every set equally likely."""
    return random_turns(len(x), x.shape[1], generator).to(x.device) < count.to(x.device)[:, None]


def hidden_nll(model: Conditionals, x: Tensor, hidden: Tensor) -> Tensor:
    """Sum over hidden tokens of -log c(token | visible tokens), (B,) in nats."""
    log_c = log_conditionals(model, x.masked_fill(hidden, model.vocabulary))
    return -picked(log_c, x).masked_fill(~hidden, 0.0).sum(1)


def score_entropy(log_score: Tensor, x: Tensor, hidden: Tensor, total: Tensor) -> Tensor:
    """Score entropy of an absorbing process (SEDD, 2310.16834), (B,), zero at the score of x itself.

    Args:
        log_score: log of the concrete scores p_t(x with i set to v) / p_t(x), (B, L, V).
        x: The clean sequences (B, L).
        hidden: Which tokens are hidden, (B, L).
        total: Total noise s(t), (B,).
    """
    log_ratio = -torch.log(torch.expm1(total))[:, None]  # of the true score when only x exists
    ratio = log_ratio.exp()
    terms = log_score.exp().sum(-1) - ratio * picked(log_score, x) + ratio * (log_ratio - 1)
    return terms.masked_fill(~hidden, 0.0).sum(1)


def discrete_loss(
    model: Conditionals,
    x: Tensor,
    loss: str = "k-dce",
    *,
    generator: torch.Generator,
    schedule: str | MaskSchedule = "log-linear",
    cutoff: float = 1e-3,
) -> Tensor:
    """One unbiased estimate of the bound on -log p(x) for every sequence.

    Args:
        model: The conditionals.
        x: Sequences (B, L), nothing hidden.
        loss: One of ``LOSSES``.
        generator: Random stream, on any device.
        schedule: For the losses in t: how fast tokens are hidden.
        cutoff: For the losses in t: the smallest time.

    Returns:
        (B,) in nats; divide by L for nats a token. Levels are stratified over the batch.

    Raises:
        UserError: An unknown loss or schedule, a cutoff outside [0, 1), or unsuitable sequences.
    """
    check_tokens(x, model, hidden=False)
    length = x.shape[1]
    if loss == "ao-arm":
        return -order_log_prob(model, x, random_turns(len(x), length, generator))
    check_name("discrete loss", loss, LOSSES)
    check_number("the time cutoff", cutoff, "[0, 1)")
    u = stratified(len(x), generator)
    if loss == "lambda-dce":
        return hidden_nll(model, x, hide_share(x, u, generator)) / u.to(x.device)
    if loss == "k-dce":
        count = (u * length).ceil()
        return hidden_nll(model, x, hide_count(x, count, generator)) * (length / count).to(x.device)
    chosen = mask_schedule(schedule)
    t = cutoff + (1 - cutoff) * u
    hidden = hide_share(x, chosen.hidden(t), generator)
    total, rate = chosen.total(t).to(x.device), (1 - cutoff) * chosen.rate(t).to(x.device)
    if loss == "t-dce":
        return hidden_nll(model, x, hidden) * rate / torch.expm1(total)
    log_c = log_conditionals(model, x.masked_fill(hidden, model.vocabulary))
    log_score = log_c - torch.log(torch.expm1(total))[:, None, None]
    return rate * score_entropy(log_score, x, hidden, total)
