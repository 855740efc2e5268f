"""Noise that belongs to a sample and a step: cut the batches differently and get the same noise.

The generator is Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011): a bijection of (sample, step, position) under a key made from the seed. It is written in torch
because torch's own generators count through a batch and NumPy's would need one object for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MOST_STEPS = 2**32
_MOST_DRAWS = 2**16


@dataclass(frozen=True)
class SampleNoise:
    """Unit normal noise for one batch; that of sample i in step k depends on (seed, i, k) alone.

    Attributes:
        seed: Seed of the run.
        indices: (B,) int64, which samples these are in the whole set; each in 0 to 2^48 - 1.
        shape: Shape of one sample.
        device: Where the noise is made. The bits are the same everywhere, the normals up to rounding.
        first_step: Number of the step that a solver calls its first; see :meth:`after`.
    """

    seed: int
    indices: Tensor | Sequence[int]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    first_step: int = 0

    def __post_init__(self) -> None:
        indices = torch.as_tensor(self.indices)
        if indices.ndim != 1 or (len(indices) and indices.dtype != torch.int64):
            raise UserError(
                "sample noise needs one whole number per sample",
                got=f"shape {tuple(indices.shape)}, {indices.dtype}",
                expected="indices of shape (B,), int64",
                fix="use torch.arange(start, start + batch)",
            )
        object.__setattr__(self, "indices", indices.to(device=self.device, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, y: Tensor) -> None:
        """Accepts only the batch that this noise is for, (B, *shape).

        Raises:
            UserError: It has another number of samples, or another shape.
        """
        if y.shape != (len(self), *self.shape):
            raise UserError(
                "the noise is not for this batch",
                got=f"{len(self)} samples of shape {tuple(self.shape)}",
                expected=f"{len(y)} of shape {tuple(y.shape[1:])}",
            )

    def after(self, steps: int) -> SampleNoise:
        """The same noise from ``steps`` steps on: what the second half of a solve in two halves needs."""
        return replace(self, first_step=self.first_step + steps)

    def normal(self, step: int, draw: int = 0) -> Tensor:
        """The noise of a step, (B, *shape) float64 (float32 on devices without float64).

        Args:
            step: Number of the step, counted from ``first_step``.
            draw: Which of several draws in one step.
        """
        size = math.prod(self.shape)
        blocks = torch.arange(-(-size // 4), device=self.device)
        k = self.first_step + step
        if not (0 <= k < _MOST_STEPS and 0 <= draw < _MOST_DRAWS):
            raise UserError("no noise is stored for this step", got=f"step {k}, draw {draw}")
        sample = torch.as_tensor(self.indices)[:, None]
        key = stream_seed(self.seed, "sample noise")
        counter = (
            blocks.expand(len(self), -1),
            torch.full_like(sample, k).expand(-1, len(blocks)),
            (sample & _WORD).expand(-1, len(blocks)),
            ((sample >> 32) << 16 | draw).expand(-1, len(blocks)),
        )
        normals = _box_muller(philox(counter, (key & _WORD, key >> 32)))
        return normals.flatten(1)[:, :size].reshape(len(self), *self.shape)


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words.

    Args:
        counter: Four tensors of one shape.
        key: Two words.

    Returns:
        Four tensors of random words in 0 to 2^32 - 1.
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two words fills all 64 bits; int64 wraps, and the masks take the right bits out of it.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((right >> 32) & _WORD) ^ b ^ k0, right & _WORD
        c, d = ((left >> 32) & _WORD) ^ d ^ k1, left & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def _box_muller(words: Words) -> Tensor:
    """Four words to four normals, (..., 4)."""
    dtype = torch.float32 if words[0].device.type == "mps" else torch.float64
    u, v, w, x = ((word.to(dtype) + 0.5) / 2**32 for word in words)
    first, second = (-2 * u.log()).sqrt(), (-2 * w.log()).sqrt()
    v, x = 2 * math.pi * v, 2 * math.pi * x
    return torch.stack([first * v.cos(), first * v.sin(), second * x.cos(), second * x.sin()], dim=-1)
