"""Random numbers from the middle of a stream, without those before them.

torch's generator on the CPU is the Mersenne Twister MT19937. Its state after any number of draws is linear in
its first one: T^k = r(T) with r = t^k modulo the characteristic polynomial of T (Haramoto, Matsumoto,
Nishimura, Panneton and L'Ecuyer 2008, "Efficient jump ahead for F2-linear random number generators"). So the
state is a sum modulo 2 of the first 20,561 words, which takes milliseconds wherever it is.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

_WORDS, _MIDDLE, _LOW = 624, 397, 31  # n, m and r of Matsumoto and Nishimura 1998
_LAST_ROW = 0x9908B0DF  # a of the matrix
_DEGREE = 32 * _WORDS - _LOW
_CHEAP = 1 << 22  # words that are drawn sooner than jumped over
_PIECE = 1 << 20
_STATE = slice(
    24, 24 + 8 * _WORDS
)  # in the bytes of torch: seed, words left, seeded, next; the words as int64


def skip(generator: torch.Generator, count: int) -> None:
    """Brings a CPU generator that was just seeded to where it is after ``count`` words of 32 bits.

    Args:
        generator: The generator; nothing was drawn from it.
        count: Number of words. A float32 takes one, uniform or, in whole blocks of 16, normal; a float64 two.
    """
    state = generator.get_state().numpy().copy()
    words = state[_STATE].view(np.uint64)
    # Where a version of torch keeps its words elsewhere, all are drawn.
    if count >= _CHEAP and int(words[0]) == generator.initial_seed() & 0xFFFFFFFF:
        words[:] = _jumped(words.astype(np.uint32), count - count % _WORDS)
        generator.set_state(torch.from_numpy(state))
        count %= _WORDS
    for begin in range(0, count, _PIECE):
        torch.rand(min(_PIECE, count - begin), generator=generator)


def _jumped(first: np.ndarray, count: int) -> np.ndarray:
    """The 624 words that are ``count`` words after the first ones."""
    source = np.random.MT19937()
    source.state = {"bit_generator": "MT19937", "state": {"key": first, "pos": _WORDS}}
    parts = [first]
    while len(parts) * _WORDS < _DEGREE + _WORDS:
        source.random_raw(_WORDS)
        parts.append(source.state["state"]["key"])
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(parts), _WORDS)
    powers = [k for k, bit in enumerate(reversed(f"{_power(count):b}")) if bit == "1"]
    return np.bitwise_xor.reduce(windows[powers])


@cache
def _power(count: int) -> int:
    """t^count modulo the characteristic polynomial; bit k is the coefficient of t^k."""
    result = 1
    for bit in f"{count:b}":
        square = int("0".join(f"{result:b}"), 2)
        result = _remainder(square << int(bit))
    return result


def _remainder(value: int) -> int:
    modulus = _characteristic()
    tail = [k for k, bit in enumerate(reversed(f"{modulus:b}")) if bit == "1" and k < _DEGREE]
    while value.bit_length() > _DEGREE:
        high = value >> _DEGREE
        value &= (1 << _DEGREE) - 1
        for k in tail:
            value ^= high << k
    return value


@cache
def _characteristic() -> int:
    """The characteristic polynomial, from the parameters (Matsumoto and Nishimura 1998, appendix A)."""
    gap = _WORDS - _MIDDLE
    found = 1
    for k in range(_LOW):
        times = found << (_MIDDLE - 1)
        found = (times ^ (times << gap)) ^ (_LAST_ROW >> k & 1)
    times = found << _MIDDLE
    return (times ^ (times << gap)) ^ (_LAST_ROW >> _LOW)
