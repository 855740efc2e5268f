"""Named random streams: the same seed and name give the same numbers, whatever other streams do."""

from __future__ import annotations

import hashlib
import math

import torch

from distmatch.base.mersenne import skip


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream ``name`` of the run seed ``seed``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the stream ``name``, on ``device``."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, name))


def initial_noise(
    n: int, shape: tuple[int, ...], seed: int, name: str = "latents", *, first: int = 0
) -> torch.Tensor:
    """Unit normal noise (n, *shape) float32 on the CPU; that of a sample depends on its number alone.

    Rows ``first`` to ``first + n`` are drawn without the rows before them.

    torch fills normals in blocks of 16 and redoes the last block when the size is not a multiple of it, so
    whole blocks are drawn and the rest is cut off.
    """
    size = math.prod(shape)
    begin = first * size // 16
    blocks = -(-(first + n) * size // 16) - begin
    stream = generator(seed, name)
    skip(stream, 16 * begin)
    flat = torch.randn(16 * blocks, generator=stream)[first * size - 16 * begin :]
    return flat[: n * size].reshape(n, *shape)
