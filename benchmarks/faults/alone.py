"""Faults of a command in one process: each is followed by the command that continues it, and a comparison."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from disks import damage_file, file_system
from launches import Fault, Launch, begun, fresh, result_of

from distmatch.training.checkpoint import list_checkpoints

STEPS = 12
RUN = ["--batch", "32", "--steps", str(STEPS), "--checkpoint-every", "3", "--log-every", "1", "--seed", "3"]
TRAIN = ["train", "--data", "ring8", "--net", "mlp", "--width", "32", "--depth", "2", *RUN]
GRACE = 10.0
"""Seconds after SIGTERM within which a run has to be on the disk; schedulers give 30 or more."""


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        kind: The kind of fault.
        what: This one.
        message: What the command printed of it.
        lost: Why the run is lost; empty where it ended as if undisturbed.
        seconds: From the fault to the end of the command, where that is measured.
    """

    kind: str
    what: str
    message: str
    lost: str
    seconds: float | None = None


Case = Callable[[], Outcome]


class Place:
    """A folder with what all faults need: undisturbed results, by command line."""

    def __init__(self, folder: Path, moments: random.Random) -> None:
        self.folder, self.moments = folder, moments
        self._results: dict[str, bytes] = {}
        self.seconds: dict[str, float] = {}
        self.teacher = folder / "teacher"
        self.distill = ["distill", "--teacher", str(self.teacher), *RUN, "--fake-score-steps", "2"]
        self.sample = ["sample", str(self.teacher), "--n", "4096", "--steps", "4", "--batch", "64"]
        self.source = folder / "source.npy"
        self.prepare = ["prepare", str(self.source), "--workers", "1"]
        if not self.teacher.exists():
            self.whole(TRAIN, self.teacher)
            images = np.random.default_rng(0).integers(0, 256, (2000, 3, 16, 16), dtype=np.uint8)
            np.save(self.source, images)

    def whole(self, line: Sequence[str], out: Path, fault: Fault = ()) -> None:
        """Runs a command line, which must end well."""
        launch = Launch([*line, "--out", str(out)], self.folder, [fault])
        if launch.wait() != [0]:
            launch.end()
            raise RuntimeError("; ".join(launch.messages()) or f"no end of {line}")

    def undisturbed(self, line: Sequence[str], suffix: str = "", fault: Fault = ()) -> bytes:
        """The result of a command line without a fault."""
        key = " ".join(line)
        if key not in self._results:
            began = time.monotonic()
            out = fresh(self.folder / f"undisturbed{suffix}")
            self.whole(line, out, fault)
            self.seconds[key] = time.monotonic() - began
            self._results[key] = result_of(out)
        return self._results[key]

    def continued(
        self, line: Sequence[str], out: Path, *, resume: str | None = "", fault: Fault = ()
    ) -> tuple[str, str]:
        """Continues what was disturbed, compares; why it is lost, and what was printed."""
        whole = self.undisturbed(line, out.suffix, fault)
        if resume is None or not begun(out):
            given = list(line)
        else:
            given = [line[0], "--resume"] if not resume else [*line, "--resume"]
        launch = Launch([*given, "--out", str(out)], self.folder, [fault])
        codes = launch.wait()
        launch.end()
        said = "; ".join(launch.messages())
        if codes != [0]:
            return f"continuing ended with {codes[0]}: {said}", said
        return ("" if result_of(out) == whole else "the result differs from the undisturbed one"), said


def _shortened(messages: Sequence[str], *folders: Path) -> str:
    text = messages[-1] if messages else "none"
    for folder in folders:
        text = text.replace(str(folder), "...")
    return text


def faulty(
    place: Place,
    kind: str,
    what: str,
    line: Sequence[str],
    fault: Fault,
    codes: Sequence[int],
    *,
    suffix: str = "",
    resume: str | None = "",
    within: Path | None = None,
    again: Fault = (),
    mend: Callable[[], None] = lambda: None,
    messages: int = 1,
) -> Outcome:
    """A command with a fault inside it, and what came of it.

    Args:
        place: The folder.
        kind: The kind of fault.
        what: This one.
        line: The command line without ``--out``.
        fault: See :mod:`injected`.
        codes: The exit codes that are right, minus the signal for killed ones.
        suffix: Of the name of the output.
        resume: What continues it: ``""`` the verb with ``--resume``, ``"all"`` the whole line with it, None
            the same line.
        within: The folder of the output.
        again: For the continuation.
        mend: Makes the machine whole again.
        messages: How many lines may be printed at most.
    """
    out = fresh((within or place.folder) / f"disturbed{suffix}")
    launch = Launch([*line, "--out", str(out)], place.folder, [fault])
    code = launch.wait()[0]
    launch.end()
    mend()
    said = launch.messages()
    lost, _ = place.continued(line, out, resume=resume, fault=again)
    if code not in codes:
        lost = lost or f"exit code {code} in place of {codes}"
    if len(said) > messages or any("Traceback" in text or "internal error" in text for text in said):
        lost = lost or f"not one message: {said}"
    return Outcome(kind, what, _shortened(said, place.folder), lost)


def killed(place: Place, scale: float) -> Iterator[Case]:
    """Kill -9: in training, in saving."""
    step = place.moments.randrange
    for verb, line in (("train", TRAIN), ("distill", place.distill)):
        for _ in range(round(8 * scale)):
            n = step(STEPS)
            yield lambda line=line, n=n, verb=verb: faulty(
                place, "kill -9", f"{verb}, step {n}", line, ("signal_at_step", n, signal.SIGKILL), [-9]
            )
        for _ in range(round(8 * scale)):
            n = step(1, 30)
            yield lambda line=line, n=n, verb=verb: faulty(
                place, "kill -9", f"{verb}, write {n}", line, ("kill_at_sync", n), [-9, 0]
            )


def killed_stores(place: Place, scale: float) -> Iterator[Case]:
    """Kill -9: in sampling, in preparing."""
    step = place.moments.randrange
    for _ in range(round(10 * scale)):
        n = step(1, 30)
        yield lambda n=n: faulty(
            place, "kill -9", f"sample, batch {n}", place.sample, ("kill_at_batch", n), [-9, 0],
            suffix=".store", resume="all",
        )  # fmt: skip
    for _ in range(round(8 * scale)):
        n = step(1, 12)
        yield lambda n=n: faulty(
            place, "kill -9", f"prepare, write {n}", place.prepare, ("small_blocks", n), [-9, 0],
            suffix=".store", resume=None, again=("small_blocks", 0),
        )  # fmt: skip


def terminated(place: Place, scale: float) -> Iterator[Case]:
    """SIGTERM at any time: a checkpoint, and the end, within the grace time."""

    def case(verb: str, line: Sequence[str], seconds: float) -> Outcome:
        out = fresh(place.folder / "disturbed")
        launch = Launch([*line, "--out", str(out)], place.folder, [("slow_steps", 0.02)])
        until = time.monotonic() + 60
        while not (out / "log.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(seconds)
        began = time.monotonic()
        launch.kill(0, signal.SIGTERM)
        code = launch.wait()[0]
        took = time.monotonic() - began
        launch.end()
        lost, _ = place.continued(line, out)
        if code not in (143, 0) or took > GRACE:
            lost = lost or f"exit code {code} after {took:.1f} s"
        what = f"{verb}, {seconds:.1f} s after its start"
        return Outcome("SIGTERM", what, _shortened(launch.messages(), place.folder), lost, took)

    for verb, line in (("train", TRAIN), ("distill", place.distill)):
        for _ in range(round(5 * scale)):
            seconds = place.moments.uniform(0, 1)
            yield lambda verb=verb, line=line, seconds=seconds: case(verb, line, seconds)


def starved(place: Place, scale: float) -> Iterator[Case]:
    """Out of memory: the error of a device, and the limit of a process."""
    for verb, line in (("train", TRAIN), ("distill", place.distill)):
        for _ in range(round(3 * scale)):
            n = place.moments.randrange(STEPS)
            yield lambda verb=verb, line=line, n=n: faulty(
                place, "out of memory", f"{verb}, device, step {n}", line, ("no_memory_at_step", n), [2]
            )
        for _ in range(round(3 * scale)):
            n = place.moments.randrange(STEPS)
            yield lambda verb=verb, line=line, n=n: faulty(
                place, "out of memory", f"{verb}, RLIMIT_AS, step {n}", line, ("memory_limit", n, 64), [2]
            )


def full(place: Place, scale: float) -> Iterator[Case]:
    """A full disk: a limit of the size of files, and a small file system; one that becomes read-only."""
    for verb, line in (("train", TRAIN), ("distill", place.distill)):
        for _ in range(round(3 * scale)):
            n, size = place.moments.randrange(STEPS), place.moments.choice((6000, 20000))
            yield lambda verb=verb, line=line, n=n, size=size: faulty(
                place, "full disk", f"{verb}, files of {size} bytes, step {n}", line,
                ("file_limit", n, size), [2],
            )  # fmt: skip
    with file_system(place.folder / "small") as disk:
        for kind, fault in (("full disk", "full_disk"), ("read-only folder", "read_only")):
            for verb, line in (("train", TRAIN), ("distill", place.distill)):
                for _ in range(round(3 * scale)):
                    n = place.moments.randrange(STEPS)
                    if disk is None:
                        yield lambda kind=kind: Outcome(kind, "skipped: mounting needs root", "", "")
                        continue

                    def mend(disk: Path = disk, fault: str = fault) -> None:
                        if fault == "read_only":
                            subprocess.run(["umount", str(disk)], check=True)
                        (disk / "filling").unlink(missing_ok=True)

                    yield lambda kind=kind, verb=verb, line=line, n=n, fault=fault, mend=mend: faulty(
                        place, kind, f"{verb}, small file system, step {n}", line, (fault, n, str(disk)),
                        [2], within=disk, mend=mend,
                    )  # fmt: skip


def damaged(place: Place, scale: float) -> Iterator[Case]:
    """The newest checkpoint is damaged: cut, emptied, removed or flipped; the run continues before it."""

    def case(verb: str, line: Sequence[str], name: str, damage: str, where: float) -> Outcome:
        out = fresh(place.folder / "disturbed")
        Launch([*line, "--out", str(out)], place.folder, [("signal_at_step", 11, signal.SIGKILL)]).wait()
        damage_file(list(list_checkpoints(out / "checkpoints").values())[-1] / name, damage, where)
        lost, _ = place.continued(line, out)
        return Outcome("damaged checkpoint", f"{verb}, {name} {damage}", "none", lost)

    for verb, line in (("train", TRAIN), ("distill", place.distill)):
        for name in ("state.safetensors", "state.json"):
            for damage in ("cut", "emptied", "removed", "flipped", "zeroed"):
                for _ in range(max(1, round(scale))):
                    where = place.moments.random()
                    yield lambda verb=verb, line=line, name=name, damage=damage, where=where: case(
                        verb, line, name, damage, where
                    )


def jumped(place: Place, scale: float) -> Iterator[Case]:
    """The clock jumps by years, forth and back, and the run is killed later."""

    def case(verb: str, line: Sequence[str], n: int, years: int) -> Outcome:
        out = fresh(place.folder / "disturbed")
        launch = Launch([*line, "--out", str(out)], place.folder, [("clock", n, years)])
        lost = "" if launch.wait() == [0] else f"ended with {launch.messages()}"
        if not lost and result_of(out) != place.undisturbed(line):
            lost = "the result differs"
        return Outcome("clock jump", f"{verb}, {years:+d} years at step {n}", "none", lost)

    for verb, line in (("train", TRAIN), ("distill", place.distill)):
        for years in (-40, -1, 1, 40)[: max(1, round(4 * scale))]:
            n = place.moments.randrange(STEPS)
            yield lambda verb=verb, line=line, n=n, years=years: case(verb, line, n, years)


def elsewhere(place: Place, scale: float) -> Iterator[Case]:
    """A second launch on the folder of a run; a run that is moved."""

    def second(resume: bool) -> Outcome:
        out = fresh(place.folder / "disturbed")
        first = Launch([*TRAIN, "--out", str(out)], place.folder, [("slow_steps", 0.2)])
        until = time.monotonic() + 60
        while not (out / "log.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.01)
        line = ["train", "--resume"] if resume else [*TRAIN, "--overwrite"]
        other = Launch([*line, "--out", str(out)], place.folder)
        code, codes = other.wait()[0], first.wait()
        lost = "" if code == 2 and codes == [0] else f"exit codes {code} and {codes[0]}"
        if not lost and result_of(out) != place.undisturbed(TRAIN):
            lost = "the result of the first differs"
        what = "--resume" if resume else "--overwrite"
        return Outcome("second launch", what, _shortened(other.messages(), place.folder), lost)

    def moved(verb: str, line: Sequence[str], n: int) -> Outcome:
        out, there = fresh(place.folder / "disturbed"), fresh(place.folder / "elsewhere")
        launch = Launch([*line, "--out", str(out)], place.folder, [("signal_at_step", n, signal.SIGKILL)])
        launch.wait()
        shutil.move(out, there)
        lost, _ = place.continued(line, there)
        return Outcome("moved run", f"{verb}, step {n}", "none", lost)

    for i in range(round(4 * scale)):
        yield lambda i=i: second(bool(i % 2))
        verb, line = ("train", TRAIN) if i % 2 else ("distill", place.distill)
        n = place.moments.randrange(1, STEPS)
        yield lambda verb=verb, line=line, n=n: moved(verb, line, n)


KINDS = (killed, killed_stores, terminated, starved, full, damaged, jumped, elsewhere)
