"""Errors that are the user's to fix: one message with what, got, expected and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

_LONGEST = 2000  # characters of one part of a message; what a file holds may have any length


def cause(error: BaseException) -> str:
    """The message of another package, in one line of at most 200 characters, for ``got``."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {_short(first, 200)}"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


class UserError(ValueError):
    """An error in the user's input. The command line prints it without a traceback and exits with 2.

    Args:
        what: What is wrong, as a sentence without its full stop.
        got: What was found.
        expected: What would have been right.
        fix: What to do about it.
    """

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        said = {"what": what, "got": got, "expected": expected, "fix": fix}
        self.parts = {name: _short(str(text), _LONGEST) for name, text in said.items() if text is not None}
        """The message: ``what``, and of ``got``, ``expected``, ``fix`` those that were given."""
        texts = [t if name == "what" else f"{name.title()}: {t}" for name, t in self.parts.items()]
        super().__init__(" ".join(text if text.endswith((".", "?")) else f"{text}." for text in texts))


class DivergedError(UserError):
    """Training produced a value that is not finite; the last good checkpoint is kept."""


class LostProcess(UserError):
    """Another process of the run has died or does not answer; the command line exits with 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill: handled as Ctrl-C is."""


def near_names(name: str, known: Iterable[str], renamed: Mapping[str, str], cutoff: float) -> list[str]:
    """At most three known names like ``name``; for one like a name of before, what that is called now."""
    found = difflib.get_close_matches(name, [*known, *renamed], n=3, cutoff=cutoff)
    return list(dict.fromkeys(renamed.get(near, near) for near in found))


def unknown_name(
    kind: str, name: object, known: Iterable[str], renamed: Mapping[str, str] = MappingProxyType({})
) -> UserError:
    """The error for a name that is not in a list, with the nearest names that are.

    Args:
        kind: What the name names, for example ``"divergence"``.
        name: What the user wrote.
        known: All valid names.
        renamed: What names of earlier releases are called now.
    """
    names = list(known)
    near = near_names(str(name)[:80].lower(), names, renamed, 0.5)
    fix = f"did you mean {' or '.join(near)}?" if near else "choose one of the names listed"
    return UserError(
        f"unknown {kind}", got=_short(repr(name), 200), expected=f"one of {', '.join(names)}", fix=fix
    )
