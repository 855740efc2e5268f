"""Text as an input of a network: word tokens or hidden states of an encoder, attended to by every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning, ConditioningSpec, FieldSpec
from distmatch.nets.layers import zeroed
from distmatch.nets.words import PADDING, TOKENS

HIDDEN, MASK = "hidden_states", "mask"
_POOLED = 64  # numbers of each token in the pooled text


@dataclass(frozen=True)
class TextInput:
    """What a network takes as text: the tokens of a vocabulary, or the hidden states of an encoder.

    Attributes:
        length: Tokens of a prompt.
        tokens: Number of different tokens, padding included; 0 for hidden states.
        size: Size of a hidden state; 0 for tokens.
    """

    length: int
    tokens: int = 0
    size: int = 0

    def __post_init__(self) -> None:
        whole = all(type(value) is int and value >= 0 for value in (self.length, self.tokens, self.size))
        if not whole or self.length == 0 or (self.tokens > 0) == (self.size > 0):
            raise UserError(
                "a network takes text as tokens or as hidden states",
                got=str(self),
                expected="a positive length, and either tokens or size",
            )

    @property
    def spec(self) -> ConditioningSpec:
        """The conditioning fields: ``tokens`` (length,), or ``hidden_states`` (length, size) and ``mask``."""
        if self.tokens:
            return {TOKENS: FieldSpec((self.length,), torch.int64)}
        return {
            HIDDEN: FieldSpec((self.length, self.size)),
            MASK: FieldSpec((self.length,), torch.int64),
        }

    def to_dict(self) -> dict[str, Any]:
        """Its JSON form."""
        return asdict(self)


class TextEmbedding(nn.Module):
    """Text as states for cross-attention, and as one vector.

    Each token is embedded with its own position, and one more state is always there, so that the empty prompt
    has something to attend to. The vector is made of all tokens side by side: it keeps their order, which a
    mean would not. Padding counts for nothing in either.

    Args:
        text: What it takes.
        width: Size of the states and of the vector.
    """

    null: Tensor
    null_mask: Tensor

    def __init__(self, text: TextInput, width: int) -> None:
        super().__init__()
        self.text = text
        self.embed: nn.Module
        self.narrow: nn.Module
        if text.tokens:
            self.embed, self.narrow = nn.Embedding(text.tokens, width), nn.Embedding(text.tokens, _POOLED)
        else:
            self.embed, self.narrow = nn.Linear(text.size, width), nn.Linear(text.size, _POOLED)
            # The encoding of the empty prompt, which is part of the model.
            self.register_buffer("null", torch.zeros(text.length, text.size))
            self.register_buffer("null_mask", torch.zeros(text.length, dtype=torch.int64))
        self.positions = nn.Parameter(0.5 * torch.randn(1 + text.length, width))
        self.pool = nn.Sequential(
            nn.Linear(text.length * _POOLED, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def null_conditioning(self, n: int) -> Conditioning:
        """The empty prompt, for ``n`` samples."""
        device = self.positions.device
        if self.text.tokens:
            return Conditioning({TOKENS: torch.full((n, self.text.length), PADDING, device=device)})
        return Conditioning({HIDDEN: self.null[None], MASK: self.null_mask[None]}).expand(n)

    def set_null(self, conditioning: Conditioning) -> None:
        """Makes one row of hidden states the empty prompt; of tokens, it is padding alone."""
        if self.text.tokens:
            return
        self.null.copy_(conditioning[HIDDEN][0])
        self.null_mask.copy_(conditioning[MASK][0])

    def forward(self, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds the fields of :attr:`TextInput.spec`.

        Returns:
            States (B, 1 + length, width); where they are text, (B, 1 + length) bool; the vector (B, width).

        Raises:
            UserError: Tokens that are not in the vocabulary; looked for on the CPU alone.
        """
        if self.text.tokens:
            inputs = conditioning[TOKENS]
            if inputs.device.type == "cpu" and inputs.numel() and not torch.compiler.is_compiling():
                _check_tokens(inputs, self.text.tokens)
            there = inputs != PADDING
        else:
            inputs = conditioning[HIDDEN].to(self.positions.dtype)
            there = conditioning[MASK] > 0
        states = F.pad(self.embed(inputs), (0, 0, 1, 0)) + self.positions
        vector = self.pool((self.narrow(inputs) * there[..., None]).flatten(1))
        return states, F.pad(there, (1, 0), value=True), vector


def _check_tokens(tokens: Tensor, number: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= number:
        raise UserError(
            "these tokens are not those of the model",
            got=f"values {low} to {high}",
            expected=f"0 (padding) to {number - 1}",
            fix="encode prompts with the model's own prompt_encoder",
        )


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to text; it starts as nothing.

    Args:
        width: Size of a token and of a state of the text.
        heads: Number of heads, a divisor of ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, tokens: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Maps tokens (B, N, width) to the same shape.

        Args:
            tokens: What attends.
            states: The text, (B, M, width).
            mask: Which states are text, (B, M) bool.
        """
        query = self.query(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pair = self.key_value(states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = pair.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.out(mixed.transpose(1, 2).flatten(2))
