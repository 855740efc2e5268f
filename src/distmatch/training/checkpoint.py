"""Checkpoints: a tree of tensors and numbers as safetensors and JSON; whole or absent, checked, no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_folder, atomic_json, load_tensors, read_json, save_tensors
from distmatch.training.packing import pack, unpack
from distmatch.training.shards import Layout, laid_out, read_shards

FORMAT = "distmatch-checkpoint"
VERSION = 1

SHARDS = "shards"
"""The folder of a checkpoint with the tensors that processes share out."""
_STEP = re.compile(r"step-(\d{6,})")
# A folder being replaced is set aside under such a name; it is the only copy if the machine stops just then.
_SET_ASIDE = re.compile(r"\.step-(\d{6,})\..*\.old")
_LEFTOVER = re.compile(r"\.step-\d{6,}\..*\.(tmp|old)")


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, tree: Any, keep: int = 3, best: int | None = None
) -> Path:
    """Writes ``folder/step-000500/`` for step 500, then removes what it makes superfluous.

    Removed are all but the newest ``keep`` checkpoints and the best one, those of later steps (they belong to
    a course of training that this one replaces) and the temporary folders of writers that were killed.
    Nothing is removed before the new checkpoint is safe on the disk. One writer at a time: see the lock of
    the run folder.

    Args:
        folder: The ``checkpoints/`` folder; made if it is missing.
        step: Number of finished steps, not negative.
        tree: What to store, see :func:`pack`.
        keep: How many checkpoints stay, at least 1.
        best: The step of one that stays besides them.

    Raises:
        UserError: The folder cannot be written or the disk is full; older checkpoints are untouched.
        TypeError: The tree holds something that a checkpoint cannot.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1, got step={step} and keep={keep}")
    return write_checkpoint(Path(folder), step, *pack(tree), keep, best)


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    structure: Any,
    keep: int,
    best: int | None,
    *,
    shards: Path | None = None,
) -> Path:
    """:func:`save_checkpoint` for a tree that is packed already.

    Args:
        folder: The ``checkpoints/`` folder.
        step: Number of finished steps.
        tensors: From :func:`pack`, without those that processes share out.
        structure: From :func:`pack`.
        keep: How many checkpoints stay.
        best: The step of one that stays besides them.
        shards: A folder beside with the others, which becomes part of the checkpoint.
    """
    target = folder / f"step-{step:06d}"
    state: dict[str, Any] = {"format": FORMAT, "version": VERSION, "step": step}
    with atomic_folder(target) as temporary:
        save_tensors(temporary / "state.safetensors", tensors)
        state |= _sums(temporary / "state.safetensors", step, structure)
        if shards is not None:
            shards.rename(temporary / SHARDS)
            state["shards"] = _sums_of_shards(temporary / SHARDS)
        atomic_json(temporary / "state.json", {**state, "structure": structure})
    _prune(folder, step, keep, best)
    return target


def list_checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The checkpoints in ``folder`` by step, ascending, whole or not; empty if there is no such folder."""
    folders = [p for p in Path(folder).iterdir() if p.is_dir()] if Path(folder).is_dir() else []
    found: dict[int, Path] = {}
    for pattern in (_SET_ASIDE, _STEP):  # the proper name last: it wins
        for path in folders:
            if match := pattern.fullmatch(path.name):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def load_checkpoint(
    folder: str | os.PathLike[str],
    which: str | int | os.PathLike[str] = "latest",
    layout: Layout = lambda name, shape: None,
) -> tuple[int, Any]:
    """Reads a checkpoint, on the CPU, after checking that it is whole.

    Args:
        folder: The ``checkpoints/`` folder, or the folder of one checkpoint.
        which: ``"latest"`` (the newest whole one; damaged ones are skipped with a warning), a step, or the
            folder of one checkpoint. Ignored when ``folder`` is itself one checkpoint.
        layout: The layout of tensors that processes share out.

    Returns:
        The step and the tree.

    Raises:
        UserError: There is none, or the requested one is damaged, or all are.
    """
    parent = Path(folder)
    if (parent / "state.json").exists() or _STEP.fullmatch(parent.name):
        return _read(parent, layout)
    if which != "latest" and not isinstance(which, int):
        return _read(Path(which), layout)
    found = list_checkpoints(parent)
    if isinstance(which, int):
        if which not in found:
            steps = ", ".join(map(str, found)) or "none"
            raise UserError(
                f"no checkpoint of step {which} in {parent}",
                expected=f"one of the steps {steps}",
                fix="name one of these, or none to continue from the newest",
            )
        return _read(found[which], layout)
    if not found:
        raise UserError(
            f"no checkpoint in {parent}",
            expected="at least one folder like step-000500",
            fix="start again without --resume, or pass the right run folder",
        )
    reasons = []
    for path in reversed(found.values()):
        try:
            loaded = _read(path, layout)
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(
                f"skipped a damaged checkpoint, {path.name} is used instead: {reason}", stacklevel=2
            )
        return loaded
    raise UserError(
        f"all {len(found)} checkpoints in {parent} are damaged",
        got=f"for the newest: {reasons[0]}",
        fix="restore the folder from a copy, or start afresh with --overwrite",
    )


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is the folder of a distmatch checkpoint, complete or not."""
    try:
        state = read_json(Path(path) / "state.json")
    except UserError:
        return False
    return isinstance(state, dict) and state.get("format") == FORMAT


def _read(path: Path, layout: Layout) -> tuple[Any, Any]:
    """Reads the folder of one checkpoint; UserError if anything about it is wrong."""
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint", expected=f"a state.json with the format {FORMAT!r}")
    if state.get("version") != VERSION:
        raise UserError(
            f"{path} was written by another version of distmatch",
            got=f"checkpoint format {state.get('version')}",
            expected=f"format {VERSION}",
            fix="install the version that wrote it (see env.json of the run)",
        )
    tensor_file = path / "state.safetensors"
    tensors = load_tensors(tensor_file)  # first, because it names a pickle and a cut file for what they are
    step, structure = state.get("step"), state.get("structure")
    sums: dict[str, Any] = _sums(tensor_file, step, structure)
    if "shards" in state:
        sums["shards"] = _sums_of_shards(path / SHARDS)
    if any(state.get(name) != value for name, value in sums.items()):
        raise UserError(
            f"{path} is damaged",
            got="contents that do not match the checksum in state.json",
            expected="the files as they were written",
            fix="use another checkpoint, or restore this one from a copy",
        )
    if type(step) is not int or step < 0:
        raise UserError(f"{path} is no checkpoint", got=f"step {step!r:.80}", expected="a number of steps")
    tensors = {name: laid_out(tensor, layout(name, tensor.shape)) for name, tensor in tensors.items()}
    if "shards" in state:
        tensors |= read_shards(path / SHARDS, layout)
    try:
        return step, unpack(tensors, structure)
    except (ValueError, KeyError, TypeError, RuntimeError, struct.error) as error:
        raise UserError(
            f"{path} is no checkpoint",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            expected="a tree of tensors and numbers as distmatch writes it",
        ) from error


def _sums(tensor_file: Path, step: Any, structure: Any) -> dict[str, str]:
    """Checksums of the file of tensors, and of the rest of the checkpoint."""
    with open(tensor_file, "rb") as file:
        tensors = hashlib.file_digest(file, "sha256").hexdigest()
    rest = hashlib.sha256(json.dumps([step, structure]).encode()).hexdigest()
    return {"sha256": tensors, "structure_sha256": rest}


def _sums_of_shards(folder: Path) -> dict[str, str]:
    """Checksums of the files of shares, by name."""
    found = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        with open(file, "rb") as handle:
            found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def _prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Removes superseded checkpoints and leftovers; ``step`` has just been written and stays."""
    found = list_checkpoints(folder)
    earlier = [s for s in found if s <= step]
    kept = {found[s] for s in earlier if s in earlier[-keep:] or s == best}
    for path in found.values():
        if path not in kept:
            # Renamed first: a removal that is cut short must not leave what looks like a damaged checkpoint.
            gone = folder / f".{path.name.lstrip('.')}.pruned.tmp"
            shutil.rmtree(gone, ignore_errors=True)
            with contextlib.suppress(OSError):  # superfluous, not harmful: the next save tries again
                path.rename(gone)
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name) and entry not in kept:
            shutil.rmtree(entry, ignore_errors=True)
