"""TOML both ways, and dataclasses from it: a config file is checked key by key before anything runs."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.inputs import parse_toml, read_limited

T = TypeVar("T")

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}


def to_toml(values: dict[str, Any]) -> str:
    """Writes a nested dict as TOML 1.0 that ``tomllib`` reads back exactly.

    Tuples come back as lists, paths as strings; an entry that is None is omitted, since TOML has no null.

    Args:
        values: Nested dicts of str, int, float, bool, list, tuple, Path and None.

    Raises:
        TypeError: Something else is in it, a key is no str, or None stands in a list; the message says where.
    """
    lines: list[str] = []
    _table(values, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n" if lines else ""


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        UserError: The file is missing, cannot be read, or is not TOML; the message shows the line.
    """
    content = read_limited(path, what="a TOML file")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text", got=str(error), expected="TOML in UTF-8") from error
    return parse_toml(text, path)


def dataclass_to_dict(options: Any) -> dict[str, Any]:
    """The nested dict of a nested dataclass, ready for :func:`to_toml` and JSON; tuples become lists."""
    return {_key_of(field): _plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def with_values(options: T, values: dict[str, Any], where: str = "the options") -> T:
    """A nested dataclass with the values of a nested dict, after checking names and types.

    Fields may be str, int, float (an int is taken too), bool, Literal, tuples of one of these, any of them or
    None, and other dataclasses, which keep their class also where the annotation is of a base class.

    Args:
        options: What gives the values that are not in the dict.
        values: What the user wrote.
        where: Where they wrote it, for the messages, for example ``"config.toml"``.

    Raises:
        UserError: A name is unknown, or a value has the wrong type.
    """
    return typing.cast(T, _with_values(options, values, where, ""))


def _key_of(field: dataclasses.Field[Any]) -> str:
    """What a field is called in files: its name, or the ``key`` of its metadata."""
    return str(field.metadata.get("key", field.name))


def _table(values: dict[str, Any], prefix: tuple[str, ...], lines: list[str]) -> None:
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"the key {key!r} in {'.'.join(prefix) or 'the dict'} is no str")
        if value is not None and not isinstance(value, dict):
            lines.append(f"{_key(key)} = {_value(value, '.'.join((*prefix, key)))}")
    for key, value in values.items():
        if isinstance(value, dict):
            path = (*prefix, key)
            lines += ["", f"[{'.'.join(map(_key, path))}]"]
            _table(value, path, lines)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key, key)


def _string(text: str, where: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(
            f"{where} cannot be written to a config file",
            got=f"{text[:80]!r}, with half a surrogate pair or bytes that are not UTF-8",
            fix="name the file or folder in UTF-8",
        )
    escaped = (_ESCAPES.get(c) or (f"\\u{ord(c):04X}" if ord(c) < 32 or ord(c) == 127 else c) for c in text)
    return f'"{"".join(escaped)}"'


def _value(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, Path)):
        return _string(str(value), where)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v, where) for v in value)}]"
    if isinstance(value, dict):
        pairs = [f"{_key(k)} = {_value(v, f'{where}.{k}')}" for k, v in value.items() if v is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    raise TypeError(f"{where} is a {type(value).__qualname__}, which TOML cannot represent")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclass_to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _with_values(options: Any, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise _wrong(prefix, values, f"a table of options of {type(options).__name__}", where)
    fields = {_key_of(field): field.name for field in dataclasses.fields(options)}
    hints = typing.get_type_hints(type(options))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name(f"option in {_place(prefix, where)}", key, fields)
        name, place = fields[key], f"{prefix}.{key}".lstrip(".")
        inner = getattr(options, name)
        if dataclasses.is_dataclass(inner):
            changes[name] = _with_values(inner, value, where, place)
        else:
            changes[name] = _convert(hints[name], value, where, place)
    return dataclasses.replace(options, **changes)


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    """``value`` as the type ``kind``; UserError where it is none."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        for allowed in members:
            if type(allowed) is type(value) and allowed == value:
                return value
        raise unknown_name(f"value of {_place(key, where)}", value, map(str, members))
    if origin in (typing.Union, types.UnionType):
        return _convert(next(m for m in members if m is not type(None)), value, where, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(members[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise _wrong(key, value, _name(kind), where)


def _place(key: str, where: str) -> str:
    return f"{where} [{key}]" if key else where


def _name(kind: Any) -> str:
    return (
        kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).removeprefix("typing.")
    )


def _wrong(key: str, value: Any, expected: str, where: str) -> UserError:
    name = "a table" if isinstance(value, dict) else f"{value!r} ({type(value).__name__})"
    return UserError(f"wrong value for {key or 'the whole'} in {where}", got=name, expected=expected)
