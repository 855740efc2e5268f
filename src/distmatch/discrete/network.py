"""A transformer over tokens, some hidden: logits of every position, or the marginal of what is visible."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError

_KERNEL = 5


@dataclass(frozen=True)
class TokenNetConfig:
    """The network for sequences of tokens.

    Attributes:
        vocabulary: Number of symbols, the hidden one not counted.
        length: Tokens in a sequence.
        width: Channels; a multiple of ``heads``.
        depth: Blocks.
        heads: Attention heads.
    """

    vocabulary: int
    length: int
    width: int = 128
    depth: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("vocabulary", "length", "width", "depth", "heads"):
            value = getattr(self, name)
            check_count(f"{name} of the token network", value)
        if self.width % self.heads:
            raise UserError("the heads must divide the width", got=f"width {self.width}, {self.heads} heads")


class _Block(nn.Module):
    """Neighboring tokens by a depthwise convolution, all tokens by attention, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.near = nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Maps (B, L, width) to (B, L, width)."""
        h = h + self.near(self.norms[0](h).transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(self.norms[1](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norms[2](h)), approximate="tanh"))


class _Trunk(nn.Module):
    """Tokens (B, L), hidden ones included, to activations (B, L, width)."""

    def __init__(self, config: TokenNetConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary + 1, config.width)
        self.positions = nn.Parameter(torch.empty(config.length, config.width))
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.positions, std=0.1)
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class _Model(nn.Module):
    """The trunk, and a last layer that starts as a constant."""

    def __init__(self, config: TokenNetConfig, outputs: int, start: float) -> None:
        super().__init__()
        self.config = config
        self.vocabulary, self.length = config.vocabulary, config.length
        self.trunk = _Trunk(config)
        self.last = nn.Linear(config.width, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, start)


class TokenNet(_Model):
    """Conditionals: logits (B, L, V) of every position given the visible tokens, without a time.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TokenNetConfig) -> None:
        super().__init__(config, config.vocabulary, 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V)."""
        return self.last(self.trunk(tokens))


class MarginalNet(_Model):
    """Marginals: log p of the visible tokens as a sum over them, so that nothing visible has probability 1.

    Each visible token adds one number, which may depend on all visible tokens; it starts at -log V, the
    uniform distribution.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TokenNetConfig) -> None:
        super().__init__(config, 1, -math.log(config.vocabulary))

    def log_marginal(self, tokens: Tensor) -> Tensor:
        """The log-probability of the visible tokens, (B,) in nats."""
        terms = self.last(self.trunk(tokens))[..., 0]
        return terms.masked_fill(tokens == self.vocabulary, 0.0).sum(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """The same as :meth:`log_marginal`."""
        return self.log_marginal(tokens)


NETWORKS: dict[str, type[TokenNet] | type[MarginalNet]] = {"conditionals": TokenNet, "marginals": MarginalNet}
"""The networks by what they give."""
