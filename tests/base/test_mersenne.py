"""Streams that are entered in the middle, against the same streams drawn from their beginning."""

from __future__ import annotations

import pytest
import torch

from distmatch.base import mersenne
from distmatch.base.seeds import generator, initial_noise
from distmatch.data.classes import drawn_labels


@pytest.mark.parametrize("count", [1, 623, 624, 19_937, 5_000_017])
def test_a_jump_ends_where_drawing_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mersenne, "_CHEAP", 0)
    drawn, jumped = generator(3, "a stream"), generator(3, "a stream")
    torch.rand(count, generator=drawn)
    mersenne.skip(jumped, count)
    assert torch.equal(torch.randn(3200, generator=jumped), torch.randn(3200, generator=drawn))


def test_two_jumps_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond what could be drawn: t^(a + b) is t^a t^b."""
    first = generator(0, "x").get_state().numpy()[mersenne._STATE].view("uint64").astype("uint32")
    a, b = 624 * 10**9, 624 * (10**12 + 7)
    twice = mersenne._jumped(mersenne._jumped(first, a), b)
    once = mersenne._jumped(first, a + b)
    assert (twice[1:] == once[1:]).all()  # of the first word only the highest bit is part of the state
    assert twice[0] >> 31 == once[0] >> 31


@pytest.mark.parametrize("shape", [(2,), (3, 5, 7), (16,)])
@pytest.mark.parametrize("cheap", [0, 1 << 22])
def test_rows_of_noise_alone_are_those_of_the_whole(
    shape: tuple[int, ...], cheap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mersenne, "_CHEAP", cheap)
    whole = initial_noise(100, shape, 5)
    for first, n in ((0, 100), (1, 3), (37, 40), (99, 1), (50, 0)):
        assert torch.equal(initial_noise(n, shape, 5, first=first), whole[first : first + n])


def test_classes_of_later_samples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mersenne, "_CHEAP", 0)
    whole = drawn_labels(5000, 10, 1, (3, 1, 4, 1, 5, 9, 2, 6, 5, 3))
    assert torch.equal(drawn_labels(999, 10, 1, (3, 1, 4, 1, 5, 9, 2, 6, 5, 3), first=4001), whole[4001:])
