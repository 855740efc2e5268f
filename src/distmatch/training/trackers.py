"""Copies of a run's events in TensorBoard, Weights & Biases and Trackio (docs/trackers.md).

A run writes `log.jsonl`, and a tracker gets what is there. One that opens is first brought up to date from
the log, without the steps that a resumed run has made void, and then follows it. So a kill loses nothing, and
no step is there twice.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distmatch.base.files import read_json
from distmatch.base.stack import caller_level
from distmatch.interop.optional import OptionalPackage
from distmatch.training.config_format import read_config
from distmatch.training.log import EventLog
from distmatch.training.options import tracker_names
from distmatch.training.runfolder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

Values = dict[str, "float | Image"]
_PICTURES, _COLUMNS = 64, 8  # of a grid of samples
_ABOUT = ("event", "step", "time")


@dataclass(frozen=True)
class Tracker:
    """An open run of a tracker.

    Attributes:
        write: Takes scalars and pictures by name, and their step.
        close: Ends the run.
        last: The last step that it had already when it was opened; -1 for none.
        given: The last step of each kind of event that it got since.
    """

    write: Callable[[Values, int], None]
    close: Callable[[], None]
    last: int = -1
    given: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What a tracker is opened with.

    Attributes:
        folder: The run folder.
        name: The name of the run.
        group: The name of its comparison; empty without.
        key: Identifies the run, wherever its folder is.
        config: The options of the run.
    """

    folder: RunFolder
    name: str
    group: str
    key: str
    config: dict[str, Any]


def check_trackers(text: str) -> None:
    """Refuses trackers that are not installed.

    Args:
        text: Their names, with commas.

    Raises:
        UserError: A package is missing.
    """
    for name in tracker_names(text):
        extra = "trackio" if name == "trackio" else "trackers"
        OptionalPackage(name, f"--track {name} needs", extra).load()


@contextmanager
def tracking(
    folder: RunFolder, text: str, *, evaluated: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A context in which trackers follow a run; what fails in one of them is a warning, and ends it alone.

    Args:
        folder: The run folder, whose log has begun.
        text: The trackers' names, with commas.
        evaluated: Whether the last evaluation in the log is new.

    Yields:
        Takes each event that the log gets from now on.
    """
    following = _Following(folder)
    if names := tracker_names(text):
        following.open(names, evaluated)
    try:
        yield following.take
    finally:
        following.close()


def track_evaluation(folder: RunFolder) -> None:
    """Gives an evaluation, once it is in the log, to the trackers that the run had."""
    if folder.config.is_file() and folder.log.is_file():
        track = read_config(folder.config).get("run", {}).get("track", "")
        with tracking(folder, track, evaluated=True):
            pass


@dataclass
class _Following:
    folder: RunFolder
    trackers: dict[str, Tracker] = field(default_factory=dict)
    step: int = 0

    def open(self, names: list[str], evaluated: bool) -> None:
        from distmatch.report.log import read_log

        for name in names:
            with self._failing(name):
                events = read_log(self.folder.log)
                tracker = self.trackers[name] = _OPENERS[name](_about(self.folder))
                for event in events:
                    self._give(tracker, event)
                evaluations = [event for event in events if event["event"] == "evaluate"]
                if evaluations and (evaluated or tracker.last < 0):
                    tracker.write(self._values(evaluations[-1]), max(self.step, tracker.last))

    def take(self, event: dict[str, Any]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._failing(name):
                self._give(tracker, event)

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._failing(name):
                tracker.close()

    def _give(self, tracker: Tracker, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("train", "watch"):
            self.step = int(event["step"])
            if self.step > max(tracker.last, tracker.given.get(kind, -1)):
                tracker.given[kind] = self.step
                tracker.write(self._values(event), self.step)

    def _values(self, event: dict[str, Any]) -> Values:
        kind, folder = event["event"], self.folder
        if kind == "evaluate":
            metrics = read_json(folder.metrics)
            pictures = {f"samples/{name}": folder.samples / f"{name}.npz" for name in metrics}
            values: Values = dict(_numbers(metrics, "evaluate"))
        else:
            step = self.step
            teacher = folder.watch / "teacher.npz"  # which a teacher in training does not have
            name = f"watch/{'student' if teacher.is_file() else 'teacher'}"
            pictures = {name: folder.watch / f"step-{step:06d}.npz"} if kind == "watch" else {}
            pictures |= (
                {"watch/teacher": teacher} if name in pictures and teacher.is_file() and step == 0 else {}
            )
            values = dict(_numbers({k: v for k, v in event.items() if k not in _ABOUT}, kind))
        return values | {name: drawn for name, path in pictures.items() if (drawn := _picture(path))}

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """A context in which an error ends a tracker, with a warning, and nothing else."""
        try:
            yield
        except Exception as error:  # whatever it is: the run is worth more than its copy
            self.trackers.pop(name, None)
            message = f"{name} does not follow this run any more: {type(error).__name__}: {str(error)[:300]}"
            warnings.warn(message, stacklevel=caller_level())
            with EventLog(self.folder.log) as log:
                log.write("warning", self.step, message=message)


def _about(folder: RunFolder) -> About:
    path = folder.path.resolve()
    with open(folder.log, "rb") as file:
        key = hashlib.sha256(file.readline()).hexdigest()[:16]
    config = read_config(folder.config) if folder.config.is_file() else {}
    compared = path.parent.name == "runs" and (path.parents[1] / "compare.json").is_file()
    place = {"folder": str(path), "report": folder.report.resolve().as_uri()}
    return About(
        folder, path.name, path.parents[1].name if compared else "", key, {**config, "run_folder": place}
    )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in an event by its path, as in ``train/ratio_mean/3``; null, for not finite, is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{name}/{key}")


def _picture(path: Path) -> Image | None:
    """The first samples of a file, as a grid; None where they are no images, or not kept."""
    from distmatch.report.grid import image_grid

    if not path.is_file():
        return None
    with np.load(path) as arrays:
        x = arrays["x"][:_PICTURES]
    if x.dtype != np.uint8:
        return None
    return image_grid(x[:, 0] if x.ndim == 5 else x, _COLUMNS).convert("RGB")


def _tensorboard(about: About) -> Tracker:
    """Event files in ``tensorboard/`` of the run folder, which are written anew whenever they are opened."""
    from torch.utils.tensorboard import SummaryWriter

    place = about.folder.path / "tensorboard"
    old = list(place.glob("events.out.tfevents.*"))
    writer: Any = SummaryWriter(place, purge_step=0)  # readers that are open forget what the old files had
    writer.add_text("config", "\n".join(f"    {line}" for line in _lines(about.config)))
    writer.add_text("report", about.config["run_folder"]["report"])
    for path in old:
        path.unlink(missing_ok=True)

    def write(values: Values, step: int) -> None:
        for name, value in values.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, step)
            else:
                writer.add_image(name, np.asarray(value), step, dataformats="HWC")
        writer.flush()

    return Tracker(write, writer.close)


def _lines(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value}"


def _wandb(about: About) -> Tracker:
    """A run of Weights & Biases, which stays on this machine unless ``WANDB_MODE`` is ``online``.

    A folder of an offline run cannot be continued: another one of the same run, with all of it, replaces it.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or "offline"
    place = Path(os.environ.get("WANDB_DIR") or about.folder.path)
    old = list((place / "wandb").glob(f"offline-run-*-{about.key}"))
    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "distmatch",
        name=about.name,
        group=about.group or None,
        id=about.key,
        config=about.config,
        dir=str(place),
        mode=mode,  # type: ignore[arg-type]
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    for path in old if mode == "offline" else ():
        shutil.rmtree(path, ignore_errors=True)

    def write(values: Values, step: int) -> None:
        shown = {k: v if isinstance(v, float) else wandb.Image(v) for k, v in values.items()}
        run.log(shown, step=max(step, run.step))

    return Tracker(write, run.finish, run.step - 1 if run.resumed else -1)


def _trackio(about: About) -> Tracker:
    """A run of Trackio, in its database on this machine unless the environment names a space or a server."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    project, name = os.environ.get("TRACKIO_PROJECT") or "distmatch", f"{about.name}-{about.key}"
    with redirect_stdout(io.StringIO()):  # its greeting is no part of what a verb prints
        run = trackio.init(
            project=project,
            name=name,
            group=about.group or None,
            config=about.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    last = SQLiteStorage.get_max_step_for_run(project, name)

    def write(values: Values, step: int) -> None:
        run.log({k: v if isinstance(v, float) else trackio.Image(v) for k, v in values.items()}, step=step)

    def close() -> None:
        with redirect_stdout(io.StringIO()):
            run.finish()

    return Tracker(write, close, -1 if last is None else last)


_OPENERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
