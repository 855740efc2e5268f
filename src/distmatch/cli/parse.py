"""Options from three places, the later ones winning: defaults, a config file, the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from distmatch.base.errors import UserError
from distmatch.base.metric_names import SPACES
from distmatch.cli.help import LETTERS, Help, asked_for, flags_of, help_text
from distmatch.cli.refusal import refusal
from distmatch.methods.table import RENAMED, current_name, find_method, readers, unknown_setting
from distmatch.training.config_format import read_config
from distmatch.training.options import DistillOptions, TrainOptions
from distmatch.training.toml import dataclass_to_dict, with_values

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The run folder, and what to do if it exists."""

    out: Path | None = None
    """The run folder to write."""
    config: Path | None = None
    """Read options from this config.toml; the command line takes precedence."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="[STEP]")] = None
    """Continue in --out from its newest checkpoint; or from a step, or a checkpoint folder."""
    overwrite: bool = False
    """Replace an existing run folder."""
    dry_run: bool = False
    """Show the resolved options, the data, sizes and an estimated time; write nothing."""
    grid: Path | None = None
    """With --dry-run: a .png to write, some of the data as they were read."""
    json: bool = False
    """Print one JSON object on stdout."""


P = TypeVar("P", bound=Place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlace(Place):
    """The run folder, and what to do if it exists."""

    auto: bool = False
    """Measure a few steps, and choose for this machine what is not given: --accumulate, --checkpointing,
    --precision, --compile. They are printed and written to the run's config.toml (docs/scale.md)."""
    auto_batch: bool = False
    """As --auto, and choose --batch by samples a second, which changes what is trained."""


def given(argv: Sequence[str], config: Path | None, names: Iterable[str]) -> set[str]:
    """Which options `--auto` leaves alone: those on the command line, and the precision of a config file.

    The other ones in a config file are about the machine that wrote it.

    Args:
        argv: The arguments after the verb.
        config: The config file, or None.
        names: Options of one word.
    """
    flags = {argument.partition("=")[0] for argument in _in_full(argv)}
    found = {name for name in names if flags & {f"--{name}", f"--no-{name}"}}
    if config is not None and "precision" in read_config(config).get("run", {}):
        found.add("precision")
    return found


def parse(kind: type[T], argv: Sequence[str], *, verb: str, said: Help, default: T | None = None) -> T:
    """Parses the options of a verb into a dataclass.

    Args:
        kind: The options' dataclass.
        argv: The arguments after the verb.
        verb: The verb.
        said: What its help says.
        default: Supplies the defaults; None takes those of the fields.

    Raises:
        UserError: Options that cannot be used.
        SystemExit: After `--help`.
    """
    if asked := asked_for(argv):
        print(help_text(kind, verb, said, default, everything=asked == "--help-all"))
        raise SystemExit(0)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[kind],  # type: ignore[valid-type,misc]
                args=_in_full(argv),
                prog=f"distmatch {verb}",
                default=default,
                add_help=False,
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        elsewhere = partial(_elsewhere, getattr(default, "options", default))
        raise refusal(stop, printed.getvalue(), verb, flags_of(kind, default), elsewhere) from None


def parse_run(
    kind: type[T],
    argv: Sequence[str],
    *,
    verb: str,
    said: Help,
    defaults: Callable[..., T] | None = None,
    hidden: Callable[[T], Iterable[str]] = lambda options: (),
    place: type[P],
) -> tuple[T, P]:
    """Parses a verb that starts a run; `--config` and `--resume` supply defaults.

    Args:
        kind: The options' dataclass.
        argv: The arguments after the verb.
        verb: The verb, for messages; must match the ``verb`` of a config file.
        said: What its help says.
        defaults: The options of a method and a preset (None: none was named), for a verb whose defaults
            depend on them; and, as ``begun``, of the method of a config file where neither decides it.
        hidden: Names of options without effect for a method, which its help omits.
        place: The options of the place.

    Raises:
        UserError: A config file that does not fit.
    """
    arguments = _with_resume_value(_in_full(argv))
    out, config, resume = (_value_of(arguments, f"--{name}") for name in ("out", "config", "resume"))
    named = _value_of(arguments, "--method"), _value_of(arguments, "--preset")
    options = kind() if defaults is None else defaults(*named)
    file = Path(config) if config is not None else Path(out) / "config.toml" if resume and out else None
    if file is not None and (config is not None or file.exists()):
        options = options_from(kind, file, verb, named=named, defaults=defaults)
    both = dataclasses.make_dataclass(
        kind.__name__,
        [("options", tyro.conf.OmitArgPrefixes[kind]), ("place", tyro.conf.OmitArgPrefixes[place])],  # type: ignore[valid-type,misc]
    )
    said = replace(said, hidden=said.hidden.union(hidden(options)))
    if named[0] is not None and said.named:
        said = replace(said, about=said.named.format(method=named[0]))
    parsed: Any = parse(both, arguments, verb=verb, said=said, default=both(options, place()))
    return parsed.options, parsed.place


def options_from(
    kind: type[T],
    path: Path,
    verb: str,
    *,
    named: tuple[str | None, str | None] = (None, None),
    defaults: Callable[..., T] | None = None,
) -> T:
    """The options in a config file.

    Args:
        kind: The options' dataclass.
        path: The file.
        verb: The verb it must be of.
        named: A method and a preset that are named elsewhere, and so win over the file's.
        defaults: As for :func:`parse_run`.

    Raises:
        UserError: The file is of another verb, or has unknown or wrong entries.
    """
    values = read_config(path)
    found = values.pop("verb", verb)
    if found != verb:
        raise UserError(
            f"{path} is the config of another verb", got=found, expected=verb, fix=f"use distmatch {found}"
        )
    if defaults is None:
        return with_values(kind(), values, where=str(path))
    for name in ("method", "preset"):
        if not isinstance(values.get(name, ""), str):
            raise UserError(f"{path}: {name} must be a name", got=values[name], expected=f'{name} = "..."')
    began = values.get("method"), values.get("preset")
    begun = _checked(defaults(*began), values, path)
    method, preset = (new if new is not None else old for new, old in zip(named, began, strict=True))
    if named == (None, None):
        return begun
    below = defaults(named[0] if named[1] is not None else method, preset, begun=began[0])
    # What another method or preset has by default nobody has chosen for this one.
    if began != (None, None) and (method, preset) != began:
        values = _without(values, dataclass_to_dict(defaults(*began)))
    return _checked(below, values, path)


def _checked(below: T, values: dict[str, Any], path: Path) -> T:
    """Options with those of a file in their place."""
    settings = values.get("distill")
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if error := _of_other_methods(below, name, value):
            raise error
    return with_values(below, values, where=str(path))


def _elsewhere(options: Any, name: str, value: Any) -> UserError | None:
    """Why options lack one: other methods have it, or the other verb that trains; None if neither does."""
    verbs = {"train": TrainOptions(), "distill": DistillOptions()}
    others = {verb: theirs for verb, theirs in verbs.items() if type(theirs) is not type(options)}
    for verb, theirs in others.items() if len(others) == 1 else ():
        flag = f"--{name.replace('_', '-')}"
        if flag in flags_of(type(theirs), theirs) or (verb == "distill" and readers(name)):
            return UserError(f"{flag} is an option of distmatch {verb}", got=value or None, fix="omit it")
    return _of_other_methods(options, name, value)


def _of_other_methods(options: Any, name: str, value: Any) -> UserError | None:
    """Why options lack a setting that other methods have; None where that is not the case."""
    if not (isinstance(options, DistillOptions) and readers(name)) or hasattr(options.settings, name):
        return None
    return unknown_setting(name, find_method(options.method), (), value)


def _without(values: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, less what is the same in ``plain``."""
    result = {}
    for key, value in values.items():
        known = plain.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            result[key] = _without(value, known)
        elif key not in plain or known != value:
            result[key] = value
    return result


def checkpoint_choice(resume: str | None) -> str | int | None:
    """What `--resume` names: ``latest``, a step, or a path."""
    return int(resume) if resume is not None and resume.isdigit() else resume


def _in_full(argv: Sequence[str]) -> list[str]:
    """`-n` and the like as `--n`, and options of before 0.2 by their present names."""
    long = {letter: f"--{name}" for name, letter in LETTERS.items()}
    old = {f"--{name.replace('_', '-')}": name for name in RENAMED}
    result = []
    for name, equals, value in (argument.partition("=") for argument in _with_all_features(argv)):
        now = f"--{current_name(old[name]).replace('_', '-')}" if name in old else long.get(name, name)
        if name in old and any(other.partition("=")[0] == now for other in argv):
            raise UserError("an option is given twice", got=f"{name} and {now}", fix=f"omit {name}")
        result.append(now + equals + value)
    return result


def _with_all_features(argv: Sequence[str]) -> list[str]:
    """The feature spaces after `--features`, in words of their own, as one list with commas."""
    result: list[str] = []
    for argument in argv:
        listed = len(result) > 1 and result[-2] == "--features"
        if listed and {*result[-1].split(","), *argument.split(",")} <= set(SPACES):
            result[-1] += f",{argument}"
        else:
            result.append(argument)
    return result


def _with_resume_value(argv: Sequence[str]) -> list[str]:
    """`--resume` without a value means the newest checkpoint."""
    result: list[str] = []
    for i, argument in enumerate(argv):
        result.append(argument)
        if argument == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            result.append("latest")
    return result


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    for i, argument in enumerate(argv):
        if argument == flag and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None
