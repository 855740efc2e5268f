"""The options of `distmatch compare`: methods, their budget, the settings they share. Imports no torch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.rules import check_rule
from distmatch.methods.table import METHODS, current_name, find_method, unknown_setting
from distmatch.training.options import DistillInputs, DistillOptions, RunOptions
from distmatch.training.presets import LAPTOP
from distmatch.training.toml import with_values

_DECIDED = {
    "steps": "the budget decides the steps",
    "seed": "all methods have the same seeds: --seed and --seeds",
    "device": "all methods run on the same device: --device",
}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(?:\d+(?:\.\d+)?\s*[smh]\s*)+")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)\s*(?:network\s+)?(steps?|calls?)")


def shared_settings() -> Any:
    """A dataclass with every setting of every method, none of which is given: all are None, or off."""
    return _shared_kind(tuple(METHODS))()


@cache
def _shared_kind(names: tuple[str, ...]) -> type:
    found: dict[str, tuple[str, Any, Any]] = {}
    for kind in (METHODS[name].settings for name in names):
        hints = get_type_hints(kind, include_extras=True)
        for f in fields(kind):
            hint, unset = (bool, False) if hints[f.name] is bool else (hints[f.name] | None, None)
            found.setdefault(f.name, (f.name, hint, field(default=unset, metadata={"of": kind})))
    return make_dataclass("SharedSettings", list(found.values()), frozen=True, kw_only=True)


@dataclass(frozen=True)
class Price:
    """What something costs in wall-clock seconds and in network calls."""

    seconds: float
    calls: float


@dataclass(frozen=True)
class Budget:
    """What every run may spend.

    Attributes:
        amount: How much.
        unit: Of what.
    """

    amount: float
    unit: Literal["seconds", "calls", "steps"]

    def steps(self, step: Price, once: Price) -> int:
        """The steps that it pays for, at least one.

        Args:
            step: What one step costs.
            once: What is made once, at the first step.

        Raises:
            UserError: It does not pay for what is made once, or there is no end to what it pays for.
        """
        if self.unit == "steps":
            return max(1, int(self.amount))
        price, first = getattr(step, self.unit), getattr(once, self.unit)
        if price <= 0:
            raise UserError(
                "a budget of network calls does not limit this method, whose steps make none",
                fix="give a budget of time or steps",
            )
        if first >= self.amount:
            raise UserError(
                "the budget does not pay for what this method makes once, before its first step",
                got=f"{self.amount:g} {self.unit}",
                expected=f"more than {first:.3g} {self.unit}",
                fix="raise --budget",
            )
        return max(1, int((self.amount - first) / price))


def parse_budget(text: str) -> Budget:
    """A budget from text.

    Raises:
        UserError: It is none.
    """
    plain = text.strip()
    if _TIME.fullmatch(plain):
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smh])", plain)
        budget = Budget(sum(float(number) * _SECONDS[unit] for number, unit in parts), "seconds")
    elif match := _COUNT.fullmatch(plain):
        number, prefix, unit = match.groups()
        amount = float(number) * {"": 1.0, "k": 1e3, "m": 1e6}[prefix.lower()]
        budget = Budget(amount, "steps" if unit.startswith("step") else "calls")
    else:
        budget = Budget(0.0, "steps")
    if budget.amount <= 0:
        raise UserError(
            "this is no budget",
            got=repr(text),
            expected="a time (90s, 5m, 1h30m), network calls (200k calls) or steps (2000 steps)",
            fix='for example --budget 5m, or --budget "2000 steps"',
        )
    return budget


@dataclass(frozen=True, kw_only=True)
class SharedOptions(DistillInputs):
    """Options shared by all methods of a comparison."""

    settings: Any = field(default_factory=shared_settings, metadata={"key": "distill"})
    """Settings that every method gets which reads them."""

    def given(self) -> dict[str, Any]:
        """The settings that are given, by name."""
        own = self.settings
        return {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `distmatch compare`."""

    methods: str = ""
    """Methods with commas: dmd2,f-distill:js,f-distill:alpha:0.5,sid. Settings of one method are in brackets,
    your own name precedes =: "strong=f-distill:js[gan_weight=0.03,fake_score_steps=3]"."""
    budget: str = "2000 steps"
    """The same for every run: a time (90s, 5m, 1h30m), network calls (200k calls) or steps (2000 steps)."""
    seeds: int = 3
    """Runs of each method; their seeds are --seed, --seed + 1, ..."""
    baseline: str = ""
    """The method that the others are compared with; empty: the best in the first metric."""
    skip_impossible: bool = False
    """Continue without the methods that cannot be used, instead of refusing the comparison."""
    retry_failed: bool = False
    """With --resume: try failed runs again."""
    features: str = "auto"
    """Features of the evaluation: classifier, pixels, a pretrained network for images (efficientnet-lite0;
    inception, clip, dinov2 with --feature-weights), several of them, or auto: classifier where there are
    labels."""
    feature_weights: str = ""
    """File of the weights of inception, clip or dinov2 (docs/metrics.md says which); of several networks
    NAME=FILE with commas."""
    n: int | None = None
    """Samples per block of the evaluation; unset: half the data, at most 5000."""
    eval_solver: str = "heun"
    """Solver for the teacher in the evaluation."""
    eval_steps: int = 18
    """Steps of the teacher's solver."""
    shared: SharedOptions = field(default_factory=SharedOptions)
    """Teacher, data, and settings that every method gets which reads them."""

    def __post_init__(self) -> None:
        check_count("--seeds", self.seeds)
        check_count("--n", 1 if self.n is None else self.n)


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
                    "the same method occurs twice in --methods" if same else "two methods have one name",
                    got=f"{other.name} and {entry.name}" if same else entry.name,
                    fix="remove one" if same else "give one of them a name: NAME=METHOD",
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


def entry_options(shared: SharedOptions, entry: Entry, *, seed: int, steps: int) -> DistillOptions:
    """The options of one run: the method's defaults, what is shared and it reads, what is its own.

    Raises:
        UserError: A setting that the method does not have, or that the comparison determines.
    """
    own = dict(entry.settings)
    options = DistillOptions.of(entry.method, str(own.pop("preset", LAPTOP)))
    plain, theirs, method = RunOptions(), options.run, find_method(entry.method)
    run = {f.name: getattr(shared.run, f.name) for f in fields(plain)}
    run = {k: v if v != getattr(plain, k) else getattr(theirs, k) for k, v in run.items()}
    read = {name: value for name, value in shared.given().items() if name in method.options()}
    options = replace(
        options,
        teacher=shared.teacher,
        data=shared.data,
        pipeline=shared.pipeline,
        prompts=shared.prompts,
        encoding=shared.encoding,
        divergence=entry.divergence or options.divergence,
        run=RunOptions(**{**run, "seed": seed, "steps": steps}),
        net=shared.net,
        settings=replace(options.settings, **read),
    )
    tables: dict[str, Any] = {"run": options.run, "net": options.net, "distill": options.settings}
    known = {f.name: table for table, group in tables.items() for f in fields(group)}
    chosen: dict[str, Any] = {}
    for name, value in own.items():
        if name in _DECIDED:
            raise UserError(f"{name} cannot be set for {entry.name} alone", fix=_DECIDED[name])
        if name not in known:
            raise unknown_setting(name, method, known.keys() - _DECIDED.keys(), value)
        chosen.setdefault(known[name], {})[name] = value
    return with_values(options, chosen, where=f"--methods {entry.name}")


def check_shared(shared: SharedOptions, entries: Sequence[Entry]) -> None:
    """Refuses what the comparison decides itself, and settings that none of its methods reads.

    Raises:
        UserError: There is such an option.
    """
    if shared.run.steps != RunOptions().steps:
        raise UserError(
            "--steps is not an option of compare", fix=f'write --budget "{shared.run.steps} steps"'
        )
    methods = [find_method(entry.method) for entry in entries]
    for name, value in shared.given().items():
        reading = [method for method in methods if name in method.options()]
        if reading:
            check_rule(reading[0].settings, name, value)
        else:
            raise UserError(
                f"--{name.replace('_', '-')} does nothing: none of these methods reads it",
                got=value,
                fix="omit it, or add a method that reads it",
            )


def _split(text: str) -> list[str]:
    """The parts between commas outside of brackets."""
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
        key = current_name(key.replace("-", "_"))
        try:
            found[key] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found
