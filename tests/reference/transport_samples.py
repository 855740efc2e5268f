"""Samples that the transport tests share."""

import pytest
import torch

from tests.helpers.draws import normal

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weights(n, seed=0):
    raw = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return raw / raw.sum()


def weighted_pair():
    """Unequal sizes, weights on both sides, three dimensions."""
    return normal(30, 3), 0.6 * normal(42, 3, seed=1) + 1, weights(30, 2), weights(42, 3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)
