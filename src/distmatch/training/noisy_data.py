"""Data with noise of known strength in them, frozen for each sample: what ambient training learns from."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.data import Dataset


def with_frozen_noise(data: Dataset, noise: float, clean_share: float, seed: int) -> tuple[Dataset, Tensor]:
    """Adds normal noise to a data set once: every time a sample is drawn it has the same noise.

    Fresh noise in each epoch would be averaged away, as if the data were clean.

    Args:
        data: Clean data.
        noise: Standard deviation of the noise, in model units.
        clean_share: Share of the samples that stay clean, in [0, 1].
        seed: Chooses these and draws the noise.

    Returns:
        The noisy data, in the same scaling, and the noise level of each sample (N,), 0 for clean.

    Raises:
        UserError: The noise is negative or the share is outside [0, 1].
    """
    if noise < 0 or not 0 <= clean_share <= 1:
        raise UserError(
            "frozen noise needs a level of 0 or more and a clean share in [0, 1]",
            got=f"noise {noise}, clean share {clean_share}",
        )
    n = len(data)
    order = torch.randperm(n, generator=generator(seed, "clean samples"))
    levels = torch.full((n,), float(noise))
    levels[order[: round(clean_share * n)]] = 0.0
    gen = generator(seed, "data noise")
    raw = torch.empty(data.raw.shape, dtype=torch.float64 if data.scaling.precise else torch.float32)
    for rows in torch.arange(n).split(4096):
        x, _ = data.batch(rows)
        eps = torch.randn(x.shape, generator=gen)
        level = levels[rows].reshape(-1, *([1] * (x.ndim - 1)))
        raw[rows] = data.scaling.to_raw(x.cpu() + level * eps)
    return dataclasses.replace(data, raw=raw.to(data.raw.device), recorded=None), levels
