"""The form of config files: the version number prevents misreading an older file."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Collection
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.stack import caller_level
from distmatch.methods.table import METHODS, RENAMED, first_default, readers
from distmatch.training.toml import dataclass_to_dict, read_toml, to_toml

FORMAT = 4
"""1, or no number: noise levels of ``distill`` in the units of the data. 2: in units of ``sigma_data``, and a
table for each family of methods. 3: all settings of a method in ``distill``, and only those that it reads.
4: with the names that :data:`~distmatch.methods.table.RENAMED` maps to."""

_LEVELS = {"distill": ("student_sigma", "noise_low", "noise_high"), "kernel": ("mmd_feature_sigma",)}
_FORMER: dict[str, tuple[Any, ...]] = {
    "level_distribution": ("karras",),
    "noise_distribution": ("karras",),
}
"""Defaults of format 2 that are others now."""
_FAMILIES = ("matching", "consistency", "kernel", "transport")


def config_text(verb: str, options: Any, without: Collection[str] = ()) -> str:
    """A config file with the options (a dataclass) of a verb.

    Args:
        verb: The verb.
        options: Its options.
        without: Options and tables to omit, by name; a table that is then empty goes too.
    """
    values: dict[str, Any] = {}
    for key, value in dataclass_to_dict(options).items():
        if isinstance(value, dict):
            # None is not written, so that a table without values goes too.
            value = {n: inner for n, inner in value.items() if n not in without and inner is not None}
        if key not in without and value != {}:
            values[key] = value
    return to_toml({"verb": verb, "format": FORMAT, **values})


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a config file, without its format number; those of an older one as today's.

    Raises:
        UserError: It cannot be read, is of a newer format, or of an older one and holds noise levels, whose
            unit has changed.
    """
    values = read_toml(path)
    found = values.pop("format", 1)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UserError(
            f"{path} is of another format",
            got=f"format = {found!r}",
            expected=f"1 to {FORMAT}",
            fix="use the release of distmatch that wrote it, or a newer one",
        )
    if found == 1 and (levels := _absolute_levels(values)):
        raise UserError(
            f"{path} has noise levels in the units of the data; they are now in units of sigma_data",
            got=", ".join(levels),
            expected=f'format = {FORMAT} at the top, and each level divided by the "sigma_data" in the '
            "teacher's model/config.json",
            fix="divide them and add the line; or remove these noise levels, for the defaults",
        )
    if found < FORMAT and _brought_up_to_date(values, found):
        warnings.warn(
            f"{os.path.abspath(path)} is of format {found} and was read as one of format {FORMAT}, which has "
            "all settings of a method in [distill], only those that it reads, and some under new names",
            stacklevel=caller_level(),
        )
    return values


def _brought_up_to_date(values: dict[str, Any], found: int) -> bool:
    """Turns the entries of an older file into today's, in place; whether any had to be."""
    before, shared = copy.deepcopy(values), values.get("shared")
    for options in (values, shared) if isinstance(shared, dict) else (values,):
        for name in _FAMILIES:
            if isinstance(options.get(name), dict) and isinstance(options.setdefault("distill", {}), dict):
                options["distill"] |= options.pop(name)
        if isinstance(settings := options.get("distill"), dict):
            for name in sorted(settings.keys() & RENAMED.keys()):
                if RENAMED[name] in settings:
                    raise UserError(
                        "a setting is given twice, under its old and its new name",
                        got=f"{name} and {RENAMED[name]}",
                        fix=f"remove {name}",
                    )
                settings[RENAMED[name]] = settings.pop(name)
    if found == 3:
        return values != before
    method = METHODS.get(str(values.get("method")).lower().replace("_", "-"))
    if method is not None and isinstance(settings := values.get("distill"), dict):
        # Files held all settings of all methods, and a run was refused with one that it did not read.
        idle = [name for name in settings if name not in method.options() and readers(name)]
        for name in [name for name in idle if settings[name] in (0, *_defaults(name))]:
            del settings[name]
    if isinstance(shared, dict):
        # Of a comparison's, those that were not the default were given.
        if isinstance(settings := shared.get("distill"), dict):
            for name in [n for n in settings if readers(n) and settings[n] in _defaults(n)]:
                del settings[name]
        for name, default in (("method", "f-distill"), ("preset", "laptop")):
            if shared.get(name) == default:
                del shared[name]
    return values != before


def _defaults(name: str) -> tuple[Any, ...]:
    """What a setting was by default, now or in format 2."""
    return (first_default(name), *_FORMER.get(name, ()))


def _absolute_levels(values: dict[str, Any]) -> list[str]:
    """The noise levels in a config file; 0 is none, as it stands for the teacher's own."""
    found = []
    shared = values.get("shared")
    for options in (values, shared if isinstance(shared, dict) else {}):
        for group, names in _LEVELS.items():
            table = options.get(group)
            if isinstance(table, dict):
                found += [f"{name} = {table[name]}" for name in names if table.get(name, 0) != 0]
    either = "|".join(name for group in _LEVELS.values() for name in group)
    return found + re.findall(rf"\b(?:{either})\s*=\s*[^,\]]*", str(values.get("methods", "")))
