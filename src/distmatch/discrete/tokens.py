"""The interfaces of the package: sequences of symbols, some hidden, and the models that read them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distmatch.base.errors import UserError


@runtime_checkable
class Conditionals(Protocol):
    """The distribution of every masked token given the visible ones, without time (RADD, 2406.03736).

    A sequence is (B, length) int64 with symbols 0 .. vocabulary - 1; a hidden token is the symbol
    ``vocabulary``.

    Attributes:
        vocabulary: Number of symbols V, the hidden symbol not counted.
        length: Tokens in a sequence.
    """

    vocabulary: int
    length: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, length, V) of each position's symbol given the visible tokens.

        Rows of visible positions are ignored. A network with a logit for the hidden symbol too, (B, length,
        V + 1) with that one last, will do: it is set to minus infinity.
        """
        ...


@runtime_checkable
class Marginals(Protocol):
    """The probability of any set of visible tokens in one evaluation (MaM, 2310.12920).

    Attributes:
        vocabulary: Number of symbols V.
        length: Tokens in a sequence.
    """

    vocabulary: int
    length: int

    def log_marginal(self, tokens: Tensor) -> Tensor:
        """The log-probability of the visible tokens, (B,) in nats; hidden tokens are summed over."""
        ...


def log_conditionals(model: Conditionals, tokens: Tensor) -> Tensor:
    """Normalized log-probabilities (B, length, V), at least float32; the hidden symbol has none.

    Raises:
        UserError: The model's output has another shape.
    """
    logits = model(tokens)
    size = logits.shape[-1] if logits.ndim else 0
    if logits.shape[:-1] != tokens.shape or size not in (model.vocabulary, model.vocabulary + 1):
        raise UserError(
            "the model of the conditionals returned another shape",
            got=tuple(logits.shape),
            expected=f"{(*tokens.shape, model.vocabulary)}, or one logit more for the hidden symbol",
        )
    logits = logits[..., : model.vocabulary]
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def check_tokens(
    tokens: Tensor, model: Conditionals | Marginals, *, hidden: bool, what: str = "the tokens"
) -> None:
    """Refuses what is not a batch of sequences of the model.

    Values are read only on the CPU, where that costs no synchronization.

    Args:
        tokens: To be checked.
        model: Gives length and vocabulary.
        hidden: Whether the hidden symbol may occur.
        what: How the message calls them.

    Raises:
        UserError: Wrong dtype, shape or symbols.
    """
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[1] != model.length:
        raise UserError(
            f"{what} must be a batch of whole sequences",
            got=f"{tokens.dtype} of shape {tuple(tokens.shape)}",
            expected=f"int64 of shape (B, {model.length})",
            fix="fill unknown places with the hidden symbol" if hidden else None,
        )
    last = model.vocabulary - (0 if hidden else 1)
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > last:
            raise UserError(
                f"{what} contain symbols outside the vocabulary",
                got=f"symbols from {low} to {high}",
                expected=f"0 to {last}" + (f", of which {last} hides a token" if hidden else ""),
            )


def picked(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The entries of ``log_p`` (B, L, V) at ``tokens`` (B, L); 0 where a token is hidden."""
    hidden = tokens == log_p.shape[-1]
    chosen = log_p.gather(-1, tokens.masked_fill(hidden, 0)[..., None])[..., 0]
    return chosen.masked_fill(hidden, 0.0)
