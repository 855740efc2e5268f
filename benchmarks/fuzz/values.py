"""Changes of text and of JSON values that the scripts of this folder share."""

from __future__ import annotations

import random
from typing import Any

DEEP = 100_000
"""Levels of the deepest nesting."""

NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**18, 1e308, -1e308, 1e-320, 0.5, float("inf"), float("nan"))
TEXTS = (
    "",
    "x" * 5000,
    "none",
    "../..",
    "/dev/zero",
    "a\0b",
    "\u202e",
    "<script>",
    "\ud800",
    "1e999",
    "🦀" * 50,
)
TOKENS = (
    *(b"[", b"]", b"{", b"}", b'"', b"'", b":", b",", b"=", b".", b"\n", b"\\", b"\x00", b"\xff", b"#"),
    *(b"NaN", b"-Infinity", b"null", b"true", b"1e999", b"9" * 400, b"9" * 5000, b"0x1p9", b"\\ud800"),
    *(b"[" * 300, b"[" * DEEP, b"{a=" * 1000, b'{"a":' * DEEP, b".a" * 2000, b"1979-05-27T07:32:00Z", b"'''"),
)


def changed_bytes(rng: random.Random, content: bytes, tokens: tuple[bytes, ...] = TOKENS) -> bytes:
    """``content`` with one to four parts cut, doubled, replaced or put in."""
    for _ in range(rng.randint(1, 4)):
        at, until = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        match rng.randrange(7):
            case 0:
                content = content[:at] + rng.choice(tokens) + content[at:]
            case 1:
                content = content[:at] + rng.choice(tokens) + content[min(at + 8, until) :]
            case 2:
                content = content[:at] + content[min(until, at + rng.choice((1, 4, 30))) :]
            case 3:
                content = content[:until] + content[at:until] + content[until:]
            case 4 if content:
                place = min(at, len(content) - 1)
                content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
            case 5:
                content = content[: rng.choice((at, until))]
            case _:
                other = rng.randrange(len(content) + 1)
                content = content[:at] + content[other : other + 20] + content[at:]
        content = content[:300_000]
    return content


def hostile(rng: random.Random) -> Any:
    """A value that hardly any field expects."""
    match rng.randrange(8):
        case 0 | 1 | 2:
            return rng.choice(NUMBERS)
        case 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice((None, True, False))
        case 5:
            return [hostile(rng) for _ in range(rng.randrange(4))]
        case 6:
            return {rng.choice(TEXTS): hostile(rng) for _ in range(rng.randrange(3))}
        case _:
            value: Any = rng.choice((1, "x"))
            for _ in range(rng.choice((3, 50, 199, 210))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            return value


def changed_value(rng: random.Random, value: Any, times: int = 1) -> Any:
    """``value``, nested dicts and lists, with some entries replaced, removed or renamed; not in place."""
    for _ in range(times):
        value = _one_change(rng, value)
    return value


def _one_change(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, rng.choice((*TEXTS, *map(str, value))): hostile(rng)}
            case _:
                return {**value, key: _one_change(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value + value[at : at + 1] * rng.choice((1, 30))
            case _:
                return [*value[:at], _one_change(rng, value[at]), *value[at + 1 :]]
    return hostile(rng)
