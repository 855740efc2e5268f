"""What a command answers with: one JSON object on stdout if requested, and warnings on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_TOLD: ContextVar[tuple[str, ...]] = ContextVar("warnings", default=())


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Within it warnings are lines on stderr, and :func:`print_json` adds those that came before it."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"warning: {message}", file=sys.stderr)
        _TOLD.set((*_TOLD.get(), str(message)))

    before = _TOLD.set(())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        _TOLD.reset(before)


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object on stdout; warnings are listed under ``warnings``."""
    warnings = [*value.get("warnings", ()), *_TOLD.get()]
    print(json.dumps({**value, "warnings": warnings} if warnings else value, allow_nan=False))
