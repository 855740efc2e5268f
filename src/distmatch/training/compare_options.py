"""What `distmatch compare` can be told: methods and the settings they share. Imports no torch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from distmatch.base.errors import UserError, unknown_name
from distmatch.methods.table import check_settings, find_method
from distmatch.training.options import GROUPS, DistillOptions, RunOptions
from distmatch.training.presets import LAPTOP
from distmatch.training.toml import dict_to_dataclass

_SETTABLE = ("run", "net", *GROUPS)
_DECIDED = {
    "steps": "the budget decides the steps",
    "seed": "all methods have the same seeds: --seed and --seeds",
    "device": "all methods run on the same device: --device",
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Everything `distmatch compare` can be told."""

    methods: str = ""
    """Methods with commas: dmd2,f-distill:js,f-distill:alpha:0.5,sid. Settings of one method stand in
    brackets, a name of your own before =: "strong=f-distill:js[gan_weight=0.03,critic_steps=3]"."""
    budget: str = "2000 steps"
    """The same for every run: a time (90s, 5m, 1h30m), network calls (200k calls) or steps (2000 steps)."""
    seeds: int = 3
    """Runs of each method; their seeds are --seed, --seed + 1, ..."""
    baseline: str = ""
    """The method that the others are compared with; empty takes the one that turns out best."""
    skip_impossible: bool = False
    """Go on without the methods that cannot be used here, instead of refusing the comparison."""
    retry_failed: bool = False
    """With --resume: try failed runs again."""
    features: str = "auto"
    """Features of the evaluation: classifier, pixels, or auto: classifier where there are labels."""
    n: int | None = None
    """Samples in a block of the evaluation; unset takes half the data, at most 5000."""
    eval_solver: str = "heun"
    """How the teacher is sampled for the evaluation."""
    eval_steps: int = 18
    """Steps of the teacher's solver."""
    shared: DistillOptions = field(default_factory=DistillOptions)
    """Teacher, data, and settings that every method gets which reads them."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError("--seeds must be at least 1", got=self.seeds)
        if self.n is not None and self.n < 1:
            raise UserError("--n must be at least 1", got=self.n)


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        name: What it is called in tables; unique.
        method: Name of the method.
        divergence: Its divergence, or None for the method's own.
        settings: Its own settings by field name, as TOML values.
        folder: Name for the folders of its runs; unique.
    """

    name: str
    method: str
    divergence: str | None
    settings: dict[str, Any]
    folder: str


def parse_methods(text: str) -> tuple[Entry, ...]:
    """The methods of a comparison from text.

    Args:
        text: As in :class:`CompareOptions`; spaces and line breaks between methods do not matter.

    Raises:
        UserError: Unknown methods, settings in a wrong form, or the same thing twice.
    """
    entries: list[Entry] = []
    for part in _split(text):
        entry = _parse_entry(part)
        for other in entries:
            same = replace(entry, name="", folder="") == replace(other, name="", folder="")
            if same or entry.name == other.name:
                raise UserError(
                    "the same method stands twice in --methods" if same else "two methods have one name",
                    got=f"{other.name} and {entry.name}" if same else entry.name,
                    fix="leave one out" if same else "give one of them a name: NAME=METHOD",
                )
        taken, folder, number = {other.folder for other in entries}, entry.folder, 1
        while folder in taken:
            number += 1
            folder = f"{entry.folder}-{number}"
        entries.append(replace(entry, folder=folder))
    if not entries:
        raise UserError(
            "no methods were named",
            expected="--methods with names separated by commas",
            fix="for example --methods dmd2,f-distill:js,f-distill:kl",
        )
    return tuple(entries)


def entry_options(shared: DistillOptions, entry: Entry, *, seed: int, steps: int) -> DistillOptions:
    """The options of one run: the method's defaults, what is shared and it reads, what is its own.

    Raises:
        UserError: A setting of its own that does not exist, or that the comparison decides.
    """
    own = dict(entry.settings)
    options = DistillOptions.of(entry.method, str(own.pop("preset", LAPTOP)))
    plain, theirs = RunOptions(), options.run
    run = {f.name: getattr(shared.run, f.name) for f in fields(plain)}
    run = {k: v if v != getattr(plain, k) else getattr(theirs, k) for k, v in run.items()}
    options = replace(
        options,
        teacher=shared.teacher,
        data=shared.data,
        divergence=entry.divergence or options.divergence,
        run=RunOptions(**{**run, "seed": seed, "steps": steps}),
        net=shared.net,
    )
    for group, name, value in _changed(shared):
        if _reads(entry.method, group, name, value):
            options = _with(options, group, {name: value})
    for name, value in own.items():
        options = _with(options, _group_of(name, entry), {name: value}, entry.name)
    return options


def check_shared(shared: DistillOptions, entries: Sequence[Entry]) -> None:
    """Refuses what the comparison decides itself, and settings that none of its methods reads.

    Raises:
        UserError: There is such an option.
    """
    plain = DistillOptions()
    for flag, given, fix in (
        ("--method", shared.method != plain.method, "name all methods with --methods"),
        ("--divergence", shared.divergence is not None, "put it behind its method: f-distill:js"),
        ("--preset", shared.preset != LAPTOP, f"put it behind its method: NAME[preset={shared.preset}]"),
        ("--steps", shared.run.steps != RunOptions().steps, f'write --budget "{shared.run.steps} steps"'),
    ):
        if given:
            raise UserError(f"{flag} is not an option of compare", fix=fix)
    for group, name, value in _changed(shared):
        if not any(_reads(entry.method, group, name, value) for entry in entries):
            raise UserError(
                f"--{name.replace('_', '-')} does nothing here: none of these methods reads it",
                got=value,
                fix="leave it out, or add a method that reads it",
            )


def _changed(shared: DistillOptions) -> list[tuple[str, str, Any]]:
    """Group, name and value of the shared settings of methods that differ from their defaults."""
    plain = DistillOptions()
    found = []
    for group in GROUPS:
        own, default = getattr(shared, group), getattr(plain, group)
        names = [f.name for f in fields(own)]
        found += [(group, k, getattr(own, k)) for k in names if getattr(own, k) != getattr(default, k)]
    return found


def _reads(method: str, group: str, name: str, value: Any) -> bool:
    """Whether a method does anything with a setting."""
    options = _with(DistillOptions.of(method), group, {name: value})
    try:
        check_settings(find_method(method), options.distill, **options.settings())
    except UserError:
        return False
    return True


def _group_of(name: str, entry: Entry) -> str:
    if name in _DECIDED:
        raise UserError(f"{name} cannot be set for {entry.name} alone", fix=_DECIDED[name])
    plain = DistillOptions()
    known = {f.name: group for group in _SETTABLE for f in fields(getattr(plain, group))}
    if name not in known:
        raise unknown_name(f"setting of {entry.name}", name, sorted(known.keys() - _DECIDED.keys()))
    return known[name]


def _with(options: DistillOptions, group: str, values: dict[str, Any], where: str = "") -> DistillOptions:
    own = getattr(options, group)
    if where:  # from text: the types are still to be checked
        built = dict_to_dataclass(type(own), values, where=f"--methods {where}")
        values = {name: getattr(built, name) for name in values}
    changes: dict[str, Any] = {group: replace(own, **values)}
    return replace(options, **changes)


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise UserError("brackets do not match", got=text.strip(), expected="METHOD[SETTING=VALUE,...]")
    return [part.strip() for part in parts if part.strip()]


def _parse_entry(text: str) -> Entry:
    match = re.fullmatch(r"(?:([^=\[\]:]+)=)?([^=\[\]:]+)(?::([^=\[\]]+))?(?:\[(.*)\])?", text, re.DOTALL)
    if match is None:
        raise UserError(
            "this is no method of a comparison",
            got=repr(text),
            expected="METHOD, METHOD:DIVERGENCE, METHOD[SETTING=VALUE,...], or NAME= before any of these",
        )
    given, method, divergence, settings = (part.strip() if part else part for part in match.groups())
    method = find_method(method).name
    plain = method + (f":{divergence}" if divergence else "") + (f"[{settings}]" if settings else "")
    name = given or re.sub(r"\s+", " ", plain)
    folder = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "method"
    return Entry(name, method, divergence or None, _parse_settings(settings or "", name), folder)


def _parse_settings(text: str, name: str) -> dict[str, Any]:
    """``a=1,b=js`` as TOML values; a word without quotes is a string."""
    found: dict[str, Any] = {}
    for part in _split(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key and value):
            raise UserError(f"a setting of {name} has no value", got=part, expected="SETTING=VALUE")
        try:
            found[key.replace("-", "_")] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found[key.replace("-", "_")] = value
    return found
