"""Streams that are entered in the middle, against the same streams drawn from their beginning."""

from __future__ import annotations

import pytest
import torch

from distmatch.base import mersenne
from distmatch.base.seeds import generator, initial_noise
from distmatch.data.classes import drawn_labels

STEP = mersenne._STEP


@pytest.mark.parametrize("count", [0, 1, 624, 20_000, STEP, STEP + 1, 7 * STEP + 12_345])
def test_a_jump_ends_where_drawing_does(count: int) -> None:
    drawn, jumped = generator(3, "a stream"), generator(3, "a stream")
    torch.rand(count, generator=drawn)
    mersenne.skip(jumped, count)
    assert torch.equal(torch.randn(3200, generator=jumped), torch.randn(3200, generator=drawn))


def test_two_jumps_are_one() -> None:
    """Far beyond what could be drawn."""
    first = generator(0, "x").get_state().numpy()[mersenne._STATE].view("uint64").astype("uint32")
    a, b = 10**6 + 1, 3 * 10**6 + 7
    twice = mersenne._jumped(mersenne._jumped(first, a), b)
    once = mersenne._jumped(first, a + b)
    assert (twice[1:] == once[1:]).all()  # of the first word only the highest bit is part of the state
    assert twice[0] >> 31 == once[0] >> 31


@pytest.mark.parametrize("shape", [(2,), (16,), (3, 100, 101)])
def test_rows_of_noise_alone_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    whole = initial_noise(100, shape, 5)
    for first, n in ((0, 100), (1, 3), (37, 40), (99, 1), (50, 0)):
        assert torch.equal(initial_noise(n, shape, 5, first=first), whole[first : first + n])


def test_classes_of_later_samples_alone() -> None:
    counts, first = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3), STEP
    whole = drawn_labels(first + 999, 10, 1, counts)
    assert torch.equal(drawn_labels(999, 10, 1, counts, first=first), whole[first:])
