"""Measurements by prompt against NumPy, and in cases whose values are known."""

from __future__ import annotations

import numpy as np
import torch

from distmatch.metrics.by_prompt import prompt_estimates, prompt_floor

TEXTS = [f"prompt {i % 3}" for i in range(30)]


def samples(seed: int, scale: float = 1.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 2, 3, 3, generator=gen)
    return torch.stack([centers[i % 3] + scale * torch.randn(2, 3, 3, generator=gen) for i in range(30)])


def by_hand(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Sums over pairs of one prompt: mean distance of different samples, and the energy distance."""

    def mean(a: np.ndarray, b: np.ndarray, *, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return float(np.mean([np.sqrt(((a[i] - b[j]) ** 2).sum()) for i, j in pairs]))

    within, theirs = mean(x, x, same=True), mean(y, y, same=True)
    return within, 2 * mean(x, y, same=False) - within - theirs


def test_values_are_ratios_of_means_over_prompts():
    x, y = samples(0, 0.5), samples(1)
    found = prompt_estimates(x, y, TEXTS)
    rows = [[i for i in range(30) if i % 3 == k] for k in range(3)]
    a, b = (v.flatten(1).double().numpy() for v in (x, y))
    ours = np.array([by_hand(a[own], b[own]) for own in rows])
    theirs = np.array([by_hand(b[own], b[own])[0] for own in rows])
    diversity, energy = ours.sum(0) / theirs.sum()
    assert np.isclose(found["prompt_diversity"].value, diversity)
    assert np.isclose(found["prompt_energy"].value, energy)
    errors = (ours[:, 0] - diversity * theirs).std(ddof=1) / theirs.mean() / 3**0.5
    assert np.isclose(found["prompt_diversity"].stderr, errors)
    assert {value.n for value in found.values()} == {3}


def test_samples_that_ignore_their_noise_have_no_diversity():
    y = samples(1)
    x = y[:3].repeat(10, 1, 1, 1)
    found = prompt_estimates(x, y, TEXTS)
    assert found["prompt_diversity"].value == 0
    assert found["prompt_vendi"].value < 0.5
    assert found["prompt_energy"].value > 0.2
    same = prompt_estimates(y, y, TEXTS)
    assert (same["prompt_diversity"].value, same["prompt_vendi"].value) == (1, 1)
    floor = prompt_floor(TEXTS)
    assert {name: value.value for name, value in floor.items()} == {"prompt_diversity": 1, "prompt_vendi": 1}


def test_few_samples_of_a_prompt_are_not_measured():
    y = samples(1)
    assert prompt_estimates(y, y, [*TEXTS[:-1], "another"]) == {}
    assert prompt_estimates(y, y, ()) == {} == prompt_floor(())
