"""The run folder: where its files are, who may write to it, and when an old one may go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from distmatch.base.errors import UserError
from distmatch.base.files import guard
from distmatch.base.inputs import checked_path, read_limited
from distmatch.base.lock import LOCK, MARK, contents, refuse_in_use, take_lock
from distmatch.base.ranks import joined
from distmatch.training.checkpoint import is_checkpoint, list_checkpoints


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; ``RunFolder(path)`` is for reading, :func:`create` gives one to write to.

    One from :func:`create` holds the lock until :meth:`release`, the end of a ``with`` block, or the end of
    the process, however that comes.

    Attributes:
        path: The folder.
    """

    path: Path
    _lock: list[int] = field(
        default_factory=list, repr=False, compare=False
    )  # the open lock file, while held

    @property
    def config(self) -> Path:
        """``config.toml``, the resolved options."""
        return self.path / "config.toml"

    @property
    def env(self) -> Path:
        """``env.json``, versions and devices."""
        return self.path / "env.json"

    @property
    def log(self) -> Path:
        """``log.jsonl``, the events."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """``checkpoints/``, a folder each."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """``samples/``: ``reference.npz``, ``teacher.npz``, ``student.npz`` and grids."""
        return self.path / "samples"

    @property
    def watch(self) -> Path:
        """``watch/``: the samples measured during training, and the teacher's."""
        return self.path / "watch"

    @property
    def metrics(self) -> Path:
        """``metrics.json``, the estimates."""
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        """``report.html``, the page."""
        return self.path / "report.html"

    @property
    def model(self) -> Path:
        """``model/``, the finished network."""
        return self.path / "model"

    def release(self) -> None:
        """Gives the lock back; without a lock it does nothing."""
        while self._lock:
            os.close(self._lock.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def create(
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> RunFolder:
    """Makes or opens a run folder for writing, and locks it against other processes.

    Args:
        path: The folder. It may be missing or empty; otherwise one of the two flags is needed.
        resume: Continue in an existing run folder; nothing in it is changed here.
        overwrite: Replace an existing run folder. The old one is set aside first and deleted once the new one
            has its name. A folder that is not a run folder is never deleted.
        inputs: Files and folders that the run reads; ``overwrite`` refuses to delete them.

    Raises:
        UserError: The folder is in use, not empty, not ours, or cannot be written, or the flags contradict.
    """
    folder = checked_path(path).resolve()
    used = check_usable(folder, resume=resume, overwrite=overwrite, inputs=inputs)
    if used and overwrite:
        return guard(lambda: _replace(folder), folder)
    run: RunFolder = guard(lambda: _open(folder), folder)
    try:
        if not resume and (found := contents(folder)):  # another process was faster, and has finished already
            raise _occupied(folder, found)
        _check_kinds(run)
    except BaseException:
        run.release()
        raise
    return run


def create_together(
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> RunFolder:
    """:func:`create` for all processes of a launch: the first one makes and locks the folder.

    Args:
        path: As of :func:`create`.
        resume: As of :func:`create`.
        overwrite: As of :func:`create`.
        inputs: As of :func:`create`.

    Raises:
        UserError: As :func:`create`; or a process does not see the folder that the first one made.
    """
    ranks = joined()
    ranks.wait()  # all have seen what is there before the first one changes it
    folder = RunFolder(checked_path(path).resolve())
    if ranks.main:
        folder = create(path, resume=resume, overwrite=overwrite, inputs=inputs)
    ranks.wait()
    if not folder.path.is_dir():
        raise UserError(
            "all processes of a run read one folder",
            got=f"{folder.path}, which process 0 has made and process {ranks.index} does not see",
            fix="choose an --out on a file system that all machines share",
        )
    return folder


def check_usable(
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> bool:
    """Raises what :func:`create` would for what is there now, and touches nothing.

    For callers with much to do before the folder is needed: errors are raised immediately.

    Returns:
        Whether there is something in the folder.

    Raises:
        UserError: The folder is not empty, not ours, or the flags contradict.
    """
    folder = checked_path(path).resolve()
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other", fix="choose one of them")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", expected="a folder", fix="choose another folder with --out")
    used = guard(lambda: contents(folder), folder)
    if used and not resume and not overwrite:
        guard(lambda: refuse_in_use(folder), folder)
        raise _occupied(folder, used)
    if used and not _is_ours(folder):
        raise UserError(
            f"{folder} is not a run folder of distmatch and was left alone",
            got=f"a folder with {', '.join(used[:5])}{' ...' if len(used) > 5 else ''}",
            expected="config.toml with log.jsonl or env.json, or distmatch checkpoints",
            fix="choose another folder with --out",
        )
    if resume and not used:
        raise UserError(
            f"there is nothing to resume in {folder}",
            got="an empty folder" if folder.exists() else "no such folder",
            expected="the folder of a run that was started",
            fix="check the path, or omit --resume to start again",
        )
    if used and overwrite:
        _refuse_needed(folder, [*map(Path, inputs), Path.cwd()])
    elif used:
        _check_kinds(RunFolder(folder))
    return bool(used)


def _check_kinds(run: RunFolder) -> None:
    """Refuses, before the run, a folder with files in the place of its outputs."""
    for path in (run.config, run.env, run.log, run.metrics, run.report):
        if path.exists() and not path.is_file():
            raise _in_the_way(path, "a file")
    for path in (run.checkpoints, run.samples, run.watch, run.model):
        if path.exists() and not path.is_dir():
            raise _in_the_way(path, "a folder")


def _in_the_way(path: Path, expected: str) -> UserError:
    return UserError(
        f"{path} is in the way of what the run writes",
        got="something of another kind",
        expected=f"{expected} of a run, or nothing",
        fix="move it elsewhere",
    )


def holds_something(run: RunFolder) -> bool:
    """Whether a run was started in a folder; the lock alone is no beginning."""
    return bool(contents(run.path))


def _is_ours(folder: Path) -> bool:
    """Whether the folder is a run folder: marked by us, or with files that only we put together."""
    try:
        if read_limited(folder / LOCK).startswith(MARK.encode()):
            return True
    except UserError:
        pass  # copied without hidden files: look at the others
    run = RunFolder(folder)
    if run.config.is_file() and (run.log.is_file() or run.env.is_file()):
        return True
    return any(is_checkpoint(path) for path in list_checkpoints(run.checkpoints).values())


def _occupied(folder: Path, used: list[str]) -> UserError:
    return UserError(
        f"{folder} is not empty",
        got=f"{len(used)} entries (first: {used[0]})",
        expected="a new or empty folder",
        fix="continue with --resume, replace it with --overwrite, or choose another folder with --out",
    )


def _refuse_needed(folder: Path, needed: list[Path]) -> None:
    for path in needed:
        if path.resolve().is_relative_to(folder):
            raise UserError(
                f"--overwrite would delete {path}, which this run needs",
                got=f"an output folder {folder} that contains it",
                fix="move it out of that folder, or choose another folder with --out",
            )


def _open(folder: Path) -> RunFolder:
    """Makes the folder if need be and takes its lock."""
    lock = folder / LOCK
    if lock.exists() and not lock.is_file():
        raise _in_the_way(lock, "a file")
    folder.mkdir(parents=True, exist_ok=True)
    return RunFolder(folder, [take_lock(folder)])


def _replace(folder: Path) -> RunFolder:
    """Puts a new locked folder in the place of an old one, then deletes the old one."""
    old_run = _open(folder)  # nobody trains in it, and nobody starts to
    fresh: Path | None = None
    run: RunFolder | None = None
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
        fresh.chmod(0o755)
        run = _open(fresh)
        aside = fresh.with_suffix(".old")  # as unique as its sibling
        os.replace(folder, aside)
        try:
            os.replace(fresh, folder)
        except BaseException:
            os.replace(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return RunFolder(folder, run._lock)
    except BaseException:
        if run is not None:
            run.release()
        raise
    finally:
        old_run.release()
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
