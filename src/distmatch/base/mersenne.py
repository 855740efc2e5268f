"""Random numbers from the middle of a stream, without those before them.

torch's generator on the CPU is the Mersenne Twister MT19937. Its state after any number of draws is linear in
its first one: T^k = r(T) with r = t^k modulo the characteristic polynomial of T (Haramoto, Matsumoto,
Nishimura, Panneton and L'Ecuyer 2008, "Efficient jump ahead for F2-linear random number generators"). So the
state is a sum modulo 2 of some of the first 20,561 words. Jumps over powers of two suffice, and each is the
square of the one before.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

_WORDS, _MIDDLE, _LOW = 624, 397, 31  # n, m and r of Matsumoto and Nishimura 1998
_LAST_ROW = 0x9908B0DF  # a of the matrix
_DEGREE = 32 * _WORDS - _LOW
_STEP = _WORDS << 11  # words of the smallest jump: fewer are drawn as fast
_PIECE = 1 << 18  # words that are drawn at a time
_SUMMED = 512  # windows that are summed at a time
_STATE = slice(
    24, 24 + 8 * _WORDS
)  # in the bytes of torch: seed, words left, seeded, next; the words as int64


def skip(generator: torch.Generator, count: int) -> None:
    """Brings a CPU generator that was just seeded to where it is after ``count`` words of 32 bits.

    Args:
        generator: The generator; nothing was drawn from it.
        count: Number of words. A float32 takes one, uniform or, in whole blocks of 16, normal; a float64 two.
    """
    steps = count // _STEP
    state = generator.get_state().numpy().copy()
    words = state[_STATE].view(np.uint64)
    # Where a version of torch keeps its words elsewhere, all are drawn.
    if steps and int(words[0]) == generator.initial_seed() & 0xFFFFFFFF:
        words[:] = _jumped(words.astype(np.uint32), steps)
        generator.set_state(torch.from_numpy(state))
        count -= steps * _STEP
    for begin in range(0, count, _PIECE):
        torch.rand(min(_PIECE, count - begin), generator=generator)


def _jumped(words: np.ndarray, steps: int) -> np.ndarray:
    """The 624 words that are ``steps`` times ``_STEP`` words after the given ones."""
    for power, bit in enumerate(reversed(f"{steps:b}")):
        if bit == "1":
            windows = np.lib.stride_tricks.sliding_window_view(_following(words), _WORDS)
            terms = _terms_of(_power(power))
            words = np.zeros(_WORDS, np.uint32)
            for begin in range(0, len(terms), _SUMMED):
                words ^= np.bitwise_xor.reduce(windows[terms[begin : begin + _SUMMED]])
    return words


def _following(words: np.ndarray) -> np.ndarray:
    """The words from the given ones on, as many as a jump depends on."""
    source = np.random.MT19937()
    source.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": _WORDS}}
    parts = [words]
    while len(parts) * _WORDS < _DEGREE + _WORDS:
        source.random_raw(_WORDS)
        parts.append(source.state["state"]["key"])
    return np.concatenate(parts)


@cache
def _power(power: int) -> int:
    """t^(_STEP 2^power) modulo the characteristic polynomial; bit k is the coefficient of t^k."""
    if power:
        return _square(_power(power - 1))
    result = 1
    for bit in f"{_STEP:b}":
        result = _remainder(_square(result) << int(bit))
    return result


def _square(value: int) -> int:
    return _remainder(int("0".join(f"{value:b}"), 2))


def _remainder(value: int) -> int:
    while value.bit_length() > _DEGREE:
        high = value >> _DEGREE
        value &= (1 << _DEGREE) - 1
        for k in _modulus():
            value ^= high << k
    return value


@cache
def _modulus() -> tuple[int, ...]:
    """The exponents of the characteristic polynomial below its degree (Matsumoto and Nishimura 1998)."""
    gap = _WORDS - _MIDDLE
    found = 1
    for k in range(_LOW):
        times = found << (_MIDDLE - 1)
        found = (times ^ (times << gap)) ^ (_LAST_ROW >> k & 1)
    times = found << _MIDDLE
    found = (times ^ (times << gap)) ^ (_LAST_ROW >> _LOW)
    return tuple(_terms_of(found & (1 << _DEGREE) - 1))


def _terms_of(value: int) -> list[int]:
    return [k for k, bit in enumerate(reversed(f"{value:b}")) if bit == "1"]
