"""`--help`: the options that most people need, on a screen. `--help-all`: all of them. Both by group."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import tyro

LETTERS = {"n": "-n", "out": "-o", "config": "-c"}
"""Options that also have a short form, in every verb that has the option."""
_WORDS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
_COLUMN = 25  # characters of an option and its value, beyond which the text stands on the next line
_NARROW, _WIDE = 72, 110
_OPEN = ("options", "shared")  # dataclasses whose options stand in the group of that around them


@dataclass(frozen=True)
class Help:
    """The help text of a command besides its options.

    Attributes:
        about: Description and examples.
        named: The same with a method, whose name replaces `{method}`; '' keeps ``about``.
        short: Names of the options that `--help` shows, with spaces; '' shows all.
        groups: Names of options, with spaces, by the title of their group; the others form a group per
            dataclass, titled by its docstring.
        hidden: Names of options that do nothing here.
    """

    about: str
    named: str = ""
    short: str = ""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hidden: frozenset[str] = frozenset()


def help_text(kind: Any, verb: str, said: Help, default: Any, *, everything: bool) -> str:
    """The help of a verb.

    Args:
        kind: The options' dataclass, or several, one after another.
        verb: The verb.
        said: What is shown where.
        default: An instance for each dataclass, whose values are the defaults; None takes the fields' own.
        everything: Whether to show all options, each with its whole text.
    """
    shown = set(said.short.split())
    titles = {name: title for title, names in said.groups.items() for name in names.split()}
    groups: dict[str, list[str]] = {}
    left_out, places = 0, []
    width = min(max(shutil.get_terminal_size().columns, _NARROW), _WIDE)
    for option in _options(kind, default):
        if option.name in said.hidden:
            continue
        if option.positional:
            places.append(option.form)
        if shown and not everything and option.name not in shown:
            left_out += 1
            continue
        title = titles.get(option.name, option.title)
        groups.setdefault(title, []).extend(option.lines(width, everything or not shown))
    lines = [" ".join([f"usage: distmatch {verb}", *places, "[options]"]), "", said.about]
    for title, own in groups.items():
        lines += ["", f"{title}:", *own]
    if left_out:
        lines += ["", f"{left_out} more options: distmatch {verb} --help-all"]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Option:
    """One option, as it is shown.

    Attributes:
        name: The field.
        title: The group of its dataclass.
        form: What is typed: `--steps INT`, `MODEL`.
        text: What it means.
        default: In words; '' where there is nothing to say.
        positional: Whether it has a place instead of a name.
    """

    name: str
    title: str
    form: str
    text: str
    default: str
    positional: bool

    def lines(self, width: int, whole: bool) -> list[str]:
        text = self.text if whole else re.split(r"(?<=[.;])\s", self.text)[0].rstrip(";")
        text = text if text.endswith("...") else text.removesuffix(".")
        text += f" (default: {self.default})" if self.default else ""
        indent = " " * (_COLUMN + 2)
        wrapped = textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        ) or [indent]
        if len(self.form) >= _COLUMN:
            return [f"  {self.form}", *wrapped]
        return [f"  {self.form}".ljust(len(indent)) + wrapped[0].strip(), *wrapped[1:]]


def _options(kind: Any, default: Any, title: str = "Options") -> Iterator[_Option]:
    """The options of a dataclass and of those inside it, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, value = hints[field.name], getattr(default, field.name, field.default)
        marks = getattr(hint, "__metadata__", ())
        hint = hint.__origin__ if marks else hint
        if value is dataclasses.MISSING and callable(field.default_factory):
            value = field.default_factory()
        if dataclasses.is_dataclass(value):
            yield from _options(type(value), value, title if field.name in _OPEN else "")
            continue
        source = field.metadata.get("of", kind)
        named = next((m.metavar for m in marks if getattr(m, "metavar", None)), None)
        flag, positional = _flag(field.name), tyro.conf.Positional in marks
        if field.name in LETTERS:
            flag = f"{LETTERS[field.name]}, {flag}"
        if hint is bool:
            form = f"--[no-]{flag[2:]}" if value is True else flag
        else:
            form = named or _word(hint) if positional else f"{flag} {named or _word(hint)}"
        plain = any(value is nothing for nothing in (dataclasses.MISSING, None, False)) or value in ("", ())
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = "" if plain else "yes" if value is True else shown
        text = next((_texts(of)[field.name] for of in source.__mro__ if field.name in _texts(of)), "")
        yield _Option(field.name, title or _title(source, field.name), form, text, shown, positional)


def _title(kind: type, name: str) -> str:
    """The title of an option's group: the first words of the docstring of the class that first has it."""
    first = next(of for of in reversed(kind.__mro__) if name in vars(of).get("__annotations__", {}))
    return (first.__doc__ or "").split(". ")[0].split("; ")[0].split("\n")[0].rstrip(".")


def _word(hint: Any) -> str:
    """The placeholder for the value of an option."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return _word(parts[0])
    if typing.get_origin(hint) in (UnionType, typing.Union):
        return _word(next(p for p in parts if p is not type(None)))
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{_word(parts[0])} ..." if parts[1:] == (...,) else " ".join(map(_word, parts))
    return _WORDS[hint]


@cache
def _texts(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, which only its source has."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, TypeError):  # no source: it was made by a program, or is not shipped
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = inspect.cleandoc(ast.literal_eval(after.value))  # type: ignore[union-attr]
    return found


def flags_of(kind: Any, default: Any = None) -> list[str]:
    """The options of a dataclass and of those inside it: ``--steps``, ..."""
    return [_flag(option.name) for option in _options(kind, default) if not option.positional]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def asked_for(argv: Iterable[str]) -> str | None:
    """The requested help: ``--help``, ``--help-all``, or None."""
    found = {"--help" if a == "-h" else a for a in argv} & {"--help", "--help-all"}
    return max(found, default=None)
