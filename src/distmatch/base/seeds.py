"""Named random streams: the same seed and name give the same numbers, whatever other streams do."""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream ``name`` of the run seed ``seed``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the stream ``name``, on ``device``."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, name))
