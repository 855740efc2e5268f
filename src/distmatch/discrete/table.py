"""An exact model of short sequences: a joint table, its conditionals, its marginals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.discrete.tokens import check_tokens

_MOST_STATES = 1 << 20


class JointTable:
    """The table of the joint distribution of ``length`` tokens: exact conditionals and marginals.

    Args:
        log_p: Log-probabilities up to a constant, of shape (V,) * length; float64 is kept.

    Raises:
        UserError: The sides differ, a value is NaN or plus infinity, or the table is too large.
    """

    def __init__(self, log_p: Tensor) -> None:
        if log_p.ndim < 1 or len(set(log_p.shape)) != 1 or log_p.shape[0] < 1:
            raise UserError(
                "a joint table needs one axis for each token, all of the size of the vocabulary",
                got=f"shape {tuple(log_p.shape)}",
            )
        check_count("the number of states to sum over", log_p.numel(), 1, _MOST_STATES)
        if bool((log_p.isnan() | (log_p == math.inf)).any()) or not bool((log_p > -math.inf).any()):
            raise UserError(
                "the log-probabilities of the table are not a distribution",
                expected="finite or -inf, not all -inf",
            )
        self.vocabulary, self.length = log_p.shape[0], log_p.ndim
        flat = log_p.flatten()
        self.log_p = flat - flat.logsumexp(0)
        codes = torch.arange(log_p.numel(), device=log_p.device)
        places = [self.vocabulary**k for k in reversed(range(self.length))]
        self.states = torch.stack([codes // place % self.vocabulary for place in places], dim=1)

    def _compatible(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of all states, -inf where one contradicts a visible token: (B, states)."""
        check_tokens(tokens, self, hidden=True)
        fits = (tokens[:, None] == self.states) | (tokens[:, None] == self.vocabulary)
        return self.log_p.masked_fill(~fits.all(-1), -math.inf)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits log p(token i = v | visible tokens), (B, L, V); uniform where those are impossible."""
        joint = self._compatible(tokens)
        top = joint.amax(1, keepdim=True)
        weight = torch.exp(joint - top.masked_fill(top == -math.inf, 0.0))
        one_hot = torch.nn.functional.one_hot(self.states, self.vocabulary).to(weight.dtype)
        sums = torch.einsum("bs,slv->blv", weight, one_hot)
        return torch.where(top[..., None] == -math.inf, 0.0, sums.log())

    def log_marginal(self, tokens: Tensor) -> Tensor:
        """The log-probability of the visible tokens, (B,)."""
        return self._compatible(tokens).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` sequences (n, L) from the distribution."""
        return self.states[torch.multinomial(self.log_p.exp(), n, replacement=True, generator=generator)]

    def code(self, tokens: Tensor) -> Tensor:
        """The index of whole sequences (B, L) in ``log_p`` and ``states``, (B,)."""
        places = self.vocabulary ** torch.arange(self.length - 1, -1, -1, device=tokens.device)
        return (tokens * places).sum(1)
