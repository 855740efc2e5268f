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

    Tuples come back as lists, paths as strings; an entry that is None is left out, since TOML has no null.

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
    """The nested dict of a nested dataclass, ready for :func:`to_toml` and JSON.

    Tuples become lists and paths strings. None stays None, except where the default is something else: there
    it becomes ``"none"``, because a key left out of the file would bring the default back.

    Raises:
        TypeError: A field is None whose default is not None and which may also be any str.
    """
    hints = typing.get_type_hints(type(options))
    result: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if not field.init:
            continue
        value = getattr(options, field.name)
        if value is None and field.default is not None and not _required(field):
            value = "none"
            if _convert(hints[field.name], value, type(options).__name__, field.name) is not None:
                raise TypeError(f"{field.name} may be the text 'none': its default has to be None")
        result[_key_of(field)] = _plain(value)
    return result


def dict_to_dataclass(cls: type[T], values: dict[str, Any], where: str = "the options") -> T:
    """Builds a nested dataclass from a nested dict, checking every name and type.

    Fields may be str, int, float (an int is taken too), bool, Path, Literal, list, tuple, dict, Any, another
    dataclass, and unions of these. Of several dataclasses in a union, the one is taken whose field ``kind``
    (a Literal) allows the ``kind`` in the dict. Keys that are missing take their defaults.

    Args:
        cls: The dataclass to build.
        values: What the user wrote.
        where: Where they wrote it, for the messages, for example ``"config.toml"``.

    Raises:
        UserError: A name is unknown, a value is missing or has the wrong type.
    """
    return typing.cast(T, _build(cls, values, where, "", None))


def with_values(options: T, values: dict[str, Any], where: str = "the options") -> T:
    """A nested dataclass with the values of a nested dict in the place of its own, checked likewise.

    A nested dataclass keeps its class, also where the annotation is of a base class.

    Args:
        options: What gives the values that are not in the dict.
        values: What the user wrote.
        where: Where they wrote it.

    Raises:
        UserError: As for :func:`dict_to_dataclass`.
    """
    return typing.cast(T, _build(type(options), values, where, "", options))


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
            f"{where} has no form in a config file",
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
    raise TypeError(f"{where} is a {type(value).__qualname__}, which TOML cannot hold")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclass_to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _build(cls: type, values: Any, where: str, prefix: str, base: Any) -> Any:
    if not isinstance(values, dict):
        raise _wrong(prefix, values, f"a table of options of {cls.__name__}", where)
    fields = {_key_of(field): field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name(f"option in {_place(prefix, where)}", key, fields)
        name, place = fields[key].name, f"{prefix}.{key}".lstrip(".")
        inner = getattr(base, name, None)
        if dataclasses.is_dataclass(inner):
            arguments[name] = _build(type(inner), value, where, place, inner)
        else:
            arguments[name] = _convert(hints[name], value, where, place)
    if base is not None:
        return dataclasses.replace(base, **arguments)
    for name, field in fields.items():
        if name not in arguments and _required(field):
            if type(None) not in get_args(hints[name]):
                raise UserError(f"{name} is missing in {_place(prefix, where)}", fix=f"add {name} = ...")
            arguments[name] = None
    return cls(**arguments)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    """``value`` as the type ``kind``; UserError where it is none."""
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        for allowed in members:
            if type(allowed) is type(value) and allowed == value:
                return value
        raise unknown_name(f"value of {_place(key, where)}", value, map(str, members))
    if origin in (typing.Union, types.UnionType):
        return _convert_union(members, value, where, key)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, where, key, None)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        kinds: tuple[Any, ...] = members
        if origin is list or members[-1] is Ellipsis:
            kinds = (members[0],) * len(value)
        if len(kinds) != len(value):
            raise _wrong(key, value, f"a list of {len(kinds)}", where)
        items = (
            _convert(k, v, where, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
        return origin(items)
    if origin is dict and isinstance(value, dict):
        return {k: _convert(members[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise _wrong(key, value, _name(kind), where)


def _convert_union(members: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    tables: list[Any] = [m for m in members if dataclasses.is_dataclass(m)]
    if isinstance(value, dict) and len(tables) == 1:
        return _build(tables[0], value, where, key, None)
    if isinstance(value, dict) and tables:
        by_kind = {name: m for m in tables for name in get_args(typing.get_type_hints(m)["kind"])}
        if "kind" not in value:
            expected = f"kind = one of {', '.join(by_kind)}"
            raise UserError(f"kind is missing in {_place(key, where)}", expected=expected)
        if value["kind"] not in list(by_kind):  # a list, because what the user wrote may not be hashable
            raise unknown_name(f"kind in {_place(key, where)}", value["kind"], by_kind)
        return _build(by_kind[value["kind"]], value, where, key, None)
    others = [m for m in members if m is not type(None)]
    # dataclass_to_dict writes "none", but an option that takes any str, or this one, means the text.
    taken = str in others or any("none" in get_args(m) for m in others if get_origin(m) is Literal)
    if len(others) < len(members) and (value is None or (value == "none" and not taken)):
        return None
    if len(others) == 1:
        return _convert(others[0], value, where, key)
    others.sort(key=lambda m: m is not type(value))  # exact types first: an int stays an int in float | int
    for member in others:
        try:
            return _convert(member, value, where, key)
        except UserError:
            continue
    raise _wrong(key, value, " or ".join(_name(m) for m in members), where)


def _place(key: str, where: str) -> str:
    return f"{where} [{key}]" if key else where


def _name(kind: Any) -> str:
    if kind is type(None):
        return '"none"'
    return (
        kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).removeprefix("typing.")
    )


def _wrong(key: str, value: Any, expected: str, where: str) -> UserError:
    name = "a table" if isinstance(value, dict) else f"{value!r} ({type(value).__name__})"
    return UserError(f"wrong value for {key or 'the whole'} in {where}", got=name, expected=expected)
