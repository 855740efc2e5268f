"""The page of a run that is still running: built again whenever its files change, until the run ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from distmatch.base.errors import UserError
from distmatch.base.files import read_json
from distmatch.report.build import build_report
from distmatch.report.compare import is_comparison
from distmatch.report.log import read_log

_FILES = ("config.toml", "env.json", "log.jsonl", "metrics.json", "compare.json")
_FOLDERS = ("samples", "watch")
_IDLE = 4.0
"""Times as long as a page takes to build, the next one waits: a watch has a fifth of a core at most."""

Seen = dict[str, tuple[int, int]]


def follow_report(
    run_folder: str | os.PathLike[str],
    seconds: float,
    *,
    tell: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Builds the page of a run again and again; while it does, the page reloads itself in a browser.

    It returns when the run has ended, or on Ctrl-C. The page that is then left does not reload itself.

    Args:
        run_folder: As for :func:`~distmatch.report.build.build_report`.
        seconds: Between looks at the files, and between reloads of the page.
        tell: Gets a line when the first page is there, and about what prevents the next from being built,
            once for each reason.
        sleep: Waits; for tests.

    Returns:
        The path of the page.

    Raises:
        UserError: It is no run folder, or one of its files is broken at the beginning.
    """
    folder = Path(run_folder)
    told = ""
    seen: Seen | None = None
    try:
        while True:
            wait, now = seconds, _files(folder)
            if now != seen:
                began = time.perf_counter()
                try:
                    if has_ended(folder):
                        break
                    build_report(folder, refresh=seconds)
                    if seen is None:
                        tell(f"watching {folder}: report.html follows it (Ctrl-C ends this)")
                    seen = now
                except UserError as error:
                    if seen is None or not folder.is_dir():
                        raise
                    if str(error) != told:  # a file that is just being replaced is whole at the next look
                        told = str(error)
                        tell(f"the page is not up to date: {error}")
                wait = max(seconds, _IDLE * (time.perf_counter() - began))
            sleep(wait)
    except KeyboardInterrupt as stop:
        if seen is None:  # nothing was built
            raise
        if type(stop) is not KeyboardInterrupt:  # SIGTERM, which exits with a code of its own
            build_report(folder)
            raise
    return build_report(folder)


def has_ended(folder: Path) -> bool:
    """Whether a run, or all runs of a comparison, have come to their end.

    A run that was resumed has not; nor has one that was interrupted, as it may be.

    Args:
        folder: The folder of the run or of the comparison.
    """
    if is_comparison(folder):
        record = read_json(folder / "compare.json")
        runs = record.get("runs") if isinstance(record, dict) else None
        return isinstance(runs, list) and all(
            isinstance(run, dict) and run.get("status") != "pending" for run in runs
        )
    log = folder / "log.jsonl"
    events = read_log(log) if log.exists() else []
    last = [e["event"] for e in events if e["event"] in ("start", "resume", "end")]
    return last[-1:] == ["end"]


def _files(folder: Path) -> Seen:
    """Time and size of each file that a page is made from."""
    found: Seen = {}
    for base in (folder, folder / "teacher", *sorted(folder.glob("runs/*"))):
        paths = [base / name for name in _FILES]
        paths += [path for name in _FOLDERS for path in (base / name).glob("*.npz")]
        for path in paths:
            try:
                stat = path.stat()
            except OSError:
                continue
            found[str(path)] = (stat.st_mtime_ns, stat.st_size)
    return found
