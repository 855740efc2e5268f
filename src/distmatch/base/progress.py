"""Progress on stderr: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

from tqdm import tqdm

_LINE_SECONDS = 10.0  # without a terminal: a line at least this often,
_LINE_FRACTION = 0.1  # and whenever this part of the work was done
_BAR_SECONDS = 0.1  # on a terminal: how often the values are read; reading one from a GPU waits for the GPU


_HUSHED = ContextVar("hushed", default=False)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """A context without progress output, at any depth of calls, if ``quiet``."""
    before = _HUSHED.set(quiet or _HUSHED.get())
    try:
        yield
    finally:
        _HUSHED.reset(before)


def tell(line: str) -> None:
    """Says on stderr what is being done; nothing within :func:`quietly`."""
    if not _HUSHED.get():
        print(line, file=sys.stderr)


def in_words(seconds: float) -> str:
    """A length of time: ``45 s``, ``12 min``, ``29 h 03 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def progress(
    total: int, *, initial: int = 0, desc: str, enabled: bool = True, delay: float = 0.0
) -> Progress:
    """A context manager that shows how far a loop is; nothing within :func:`quietly`.

    Args:
        total: Number of steps at the end.
        initial: Number of steps done before, for example at a resume; they do not count for the ETA.
        desc: A title of one or two words.
        enabled: False shows nothing.
        delay: Seconds to wait before showing anything: shorter tasks show no bar.
    """
    return Progress(total, initial, desc, enabled, delay)


class Progress:
    """What :func:`progress` returns; call :meth:`update` in the loop.

    Args:
        total: Number of steps at the end.
        initial: Number of steps done before.
        desc: Title.
        enabled: False shows nothing.
        delay: Seconds before anything is shown.
    """

    def __init__(self, total: int, initial: int, desc: str, enabled: bool, delay: float = 0.0) -> None:
        self.delay = delay
        self.total, self.initial, self.step, self.desc = total, initial, initial, desc
        self._stream = sys.stderr
        self._start = self._shown_at = time.monotonic()
        self._shown_step = initial
        self._values: dict[str, Any] = {}
        self._bar: Any = None
        enabled = (
            enabled and not _HUSHED.get() and self._stream is not None
        )  # a program without a terminal may have none
        self._lines = enabled and not self._stream.isatty()
        if enabled and not self._lines:
            self._bar = tqdm(
                total=total, initial=initial, desc=desc, file=self._stream, dynamic_ncols=True, delay=delay
            )

    def update(self, n: int = 1, **shown: Any) -> None:
        """Counts ``n`` more steps.

        Args:
            n: Number of steps done since the last call.
            shown: Values to show; numbers and one-element tensors with three digits. Without
                any, those of the last call stay.
        """
        self.step += n
        self._values = shown or self._values
        now = time.monotonic()
        if self._bar is not None:
            if now - self._shown_at >= _BAR_SECONDS:
                self._shown_at = now
                self._bar.set_postfix_str(self._text(", ", "="), refresh=False)
            self._bar.update(n)
        elif self._lines and now - self._start >= self.delay:
            share = (self.step - self._shown_step) / max(self.total, 1)
            if share >= _LINE_FRACTION or now - self._shown_at >= _LINE_SECONDS:
                self._line(now)

    def close(self) -> None:
        """Shows the last state, once."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(", ", "="), refresh=True)
            self._bar.close()
            self._bar = None
        elif self._lines and self.step != self._shown_step:
            now = time.monotonic()
            if now - self._start >= self.delay:
                self._line(now)
        self._lines = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self, now: float) -> None:
        self._shown_at, self._shown_step = now, self.step
        elapsed, done, left = now - self._start, self.step - self.initial, self.total - self.step
        timing = f"elapsed {tqdm.format_interval(elapsed)}"
        if left > 0 and done > 0:
            timing += f", ETA {tqdm.format_interval(elapsed / done * left)}"
        values = self._text(", ", " ")
        percent = 100 * self.step / max(self.total, 1)
        line = f"{self.desc}: {self.step}/{self.total} ({percent:.0f}%), {timing}"
        print(f"{line}, {values}" if values else line, file=self._stream, flush=True)

    def _text(self, between: str, equals: str) -> str:
        return between.join(f"{name}{equals}{_short(value)}" for name, value in self._values.items())


def _short(value: Any) -> str:
    if isinstance(value, (bool, int, str)):
        return str(value)
    try:
        return f"{float(value):.3g}"
    except (TypeError, ValueError):
        return str(value)
