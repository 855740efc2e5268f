"""The options that a resumed run may change, and the record of changes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_write
from distmatch.base.inputs import read_limited
from distmatch.divergences import divergence
from distmatch.methods.table import resolve_method
from distmatch.training.config_format import config_text, read_config
from distmatch.training.options import DistillOptions, OwnOptions, TrainOptions
from distmatch.training.toml import dataclass_to_dict

# They change how a run is carried out, not what it computes.
_FREE = (
    *(
        "run.parallel",
        "run.shard_size",
        "run.device",
        "run.compile",
        "run.compile_mode",
        "run.keep",
        "run.checkpoint_every",
        "run.log_every",
    ),
    *("watch.watch_every", "watch.watch_samples", "watch.watch_grid", "watch.keep_best", "watch.result"),
)
# Changed in the middle by those who know why; each stretch of the run is written down with its own.
_RATES = ("lr", "lr_fake_score", "lr_discriminator", "grad_clip", "track")
_PATHS = ("data", "teacher")
_HEAD = "# until step "
PROMPTS, DATA = "prompts_sha256", "data_sha256"
"""Names of the hashes of prompts and data in the ``start`` events of a log."""

AnyOptions = TrainOptions | DistillOptions | OwnOptions
Changes = dict[str, tuple[Any, Any]]
"""Options by their place in the config, as they were and as they are."""


def changes_on_resume(options: AnyOptions, config: Path) -> Changes:
    """The options that differ from those that a run was started with.

    Args:
        options: The options of the continuation.
        config: Its ``config.toml``; a run without one is taken as it is.

    Raises:
        UserError: One of them would make another run of it: anything but the learning rates, the gradient
            clipping, more steps, and options that do not affect the results.
    """
    if not config.exists():
        return {}
    values = read_config(config)
    if isinstance(options, DistillOptions):
        _check_same_method(options, values, config)
    usual = DistillOptions(method=options.method) if isinstance(options, DistillOptions) else type(options)()
    begun, plain, now = (
        dict(_flat(tree)) for tree in (values, dataclass_to_dict(usual), dataclass_to_dict(options))
    )
    changes: Changes = {}
    for name, value in now.items():
        # An option that is None is not in the file; another one that is not there is newer than the file.
        if name in begun or plain.get(name) is None:
            before = begun.get(name)
            if before != value and not (name in _PATHS and _same_place(before, value)):
                changes[name] = (before, value)
    for name in ("method", "divergence", *_FREE):
        changes.pop(name, None)
    if changes.get("net.net", ("",))[0] == "auto":  # older files; another network does not fit the checkpoint
        del changes["net.net"]
    for name, (before, value) in changes.items():
        flag = "--" + name.split(".")[-1].replace("_", "-")
        if name == "run.steps":
            if value < before:
                raise UserError(
                    "a resumed run cannot become shorter",
                    got=f"--steps {value}, in a run of {before}",
                    fix=f"give --steps {before} or more, or omit it",
                )
        elif name.split(".")[-1] not in _RATES:
            raise UserError(
                f"a resumed run keeps its {flag}",
                got=f"{flag} {value}, in a run of {before}",
                expected="the options of the run; only learning rates may change, and --steps may grow",
                fix=f"omit {flag}, or start another run: --config {config} --out FOLDER",
            )
    return changes


def check_inputs(notes: Mapping[str, Any], log: Path) -> None:
    """Refuses to continue a run on prompts or data that have changed, which the names of files do not show.

    Args:
        notes: The hashes of now by name; without one that a run does not have.
        log: The ``log.jsonl`` of the run; older ones do not record them.

    Raises:
        UserError: The run began with others.
    """
    begun: dict[str, Any] = {}  # of the last start: one without a checkpoint may have been on others
    for line in read_limited(log, 2**28, "a log.jsonl").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # a line that a crash cut short
            event = json.loads(line) if b'"start"' in line else {}
            begun |= event if event.get("event") == "start" else {}
    require_same_inputs(notes, begun)


def require_same_inputs(notes: Mapping[str, Any], begun: Mapping[str, Any]) -> None:
    """Refuses prompts and data with other hashes than those that a run began with, where these are known.

    Raises:
        UserError: They are others.
    """
    for name, what, which in (
        (PROMPTS, "prompts", "prompts"),
        (DATA, "data", "samples, labels and captions"),
    ):
        now, before = notes.get(name), begun.get(name)
        if now and before and now != before:
            raise UserError(
                f"a resumed run keeps its {what}, and these are not those that it began with",
                got=f"{what} with the sha256 {now[:12]}..., in a run on {str(before)[:12]}...",
                expected=f"the same {which} in the same order: what a step sees depends on them",
                fix=f"restore the files of the {what}, or start another run: another --out",
            )


def write_config(options: AnyOptions, verb: str, config: Path) -> None:
    """Writes the ``config.toml`` of a run that begins."""
    atomic_write(config, config_text(verb, options))


def write_segment(options: AnyOptions, verb: str, config: Path, step: int, changes: Changes) -> None:
    """Updates ``config.toml`` for a run that continues from ``step`` with other options.

    It holds the options of the last stretch, as the next ``--resume`` needs them; earlier values are recorded
    above them, one line each.
    """
    if not changes:
        return
    text = read_limited(config, what="a TOML file").decode()
    earlier = [line for line in text.splitlines() if line.startswith(_HEAD)]
    had = ", ".join(f"{name} = {before}" for name, (before, _) in changes.items())
    lines = [*earlier, f"{_HEAD}{step}: {had}"]
    atomic_write(config, "\n".join(lines) + "\n\n" + config_text(verb, options))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _same_place(before: Any, now: Any) -> bool:
    """Whether two texts name one file or folder."""
    try:
        return os.path.samefile(str(before), str(now))
    except (OSError, ValueError):
        return False


def _check_same_method(options: DistillOptions, values: dict[str, Any], config: Path) -> None:
    """Refuses to continue a run of another method: networks of the same shape would let it pass."""
    before = _choice(values.get("method", DistillOptions().method), values.get("divergence"))
    now = _choice(options.method, options.divergence)
    for name, had, has in zip(("method", "divergence"), before, now, strict=True):
        if had != has:
            raise UserError(
                f"a resumed run keeps its {name}",
                got=f"--{name} {has}, in a run of {had}",
                fix=f"omit --{name}, or start another run: --config {config} --out FOLDER",
            )


def _choice(method: str, measure: str | None) -> tuple[str, str]:
    """Method and divergence by their own names."""
    found, name = resolve_method(method, measure)
    return found.name, divergence(name).name
