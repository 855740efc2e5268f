"""Does a run that is killed at random moments end with the weights of an undisturbed one?

    python benchmarks/kill9.py

For `train` and for `distill`: a run without disturbance first, then the same run killed with SIGKILL after
random times and resumed each time with `--resume`, until it has ended. The steps are short and checkpoints
frequent, so that many kills hit the writing of a checkpoint. One row a kill: when it came (seconds after the
process had written to its log), the last step in the log, the newest checkpoint, and how many temporary files
and folders lay about. Exit code 1 when `model.safetensors` differs in a single bit, or when the run ended
before all kills.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from distmatch.training.checkpoint import list_checkpoints

RUN = ["--batch", "32", "--checkpoint-every", "5", "--log-every", "1", "--seed", "3"]
NET = ["--net", "mlp", "--width", "64", "--depth", "2"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    kills: int = 20
    steps: int = 400
    seed: int = 0
    """Seed of the moments."""


@dataclass(frozen=True)
class Kill:
    """One kill and what it left.

    Attributes:
        seconds: Time after the process began to train.
        step: Last step in the log.
        checkpoint: Step of the newest checkpoint with its proper name; 0 where there is none.
        torn: Temporary folders and files it left behind: it came while something was being written.
    """

    seconds: float
    step: int
    checkpoint: int
    torn: int


def program(line: list[str]) -> subprocess.Popen[bytes]:
    """A command line of distmatch in a process of its own."""
    command = [sys.executable, "-m", "distmatch", *line]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class Run:
    """One run folder and the processes that work in it, one after the other.

    Args:
        start: The command line that starts the run, without `--out`.
        out: The run folder.
        spawn: Begins a process with a command line, as :func:`program` does.
    """

    def __init__(self, start: list[str], out: Path, spawn: Callable[[list[str]], Any] = program) -> None:
        self.verb, self.start, self.out, self.spawn = start[0], start, out, spawn

    def _spawn(self) -> Any:
        begun = list_checkpoints(self.out / "checkpoints") or (self.out / "log.jsonl").exists()
        return self.spawn([*([self.verb, "--resume"] if begun else self.start), "--out", str(self.out)])

    def events(self) -> list[dict[str, object]]:
        """The whole lines of the log."""
        log = self.out / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # cut short by a kill
                continue
        return found

    def begin(self) -> Any:
        """Starts or resumes the run, and returns once the process has begun to train."""
        log = self.out / "log.jsonl"
        before = log.stat().st_size if log.exists() else 0
        process = self._spawn()
        while process.poll() is None and (not log.exists() or log.stat().st_size == before):
            time.sleep(0.002)
        return process

    def finish(self) -> float:
        """Starts or resumes the run and lets it end; seconds from its first log line."""
        process = self.begin()
        began = time.perf_counter()
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(errors.decode())
        return time.perf_counter() - began

    def kill(self, seconds: float) -> Kill | None:
        """Starts or resumes the run and kills it after a time; None when it ended before that."""
        before = self._leftovers()
        process = self.begin()
        time.sleep(seconds)
        process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            return None
        if process.returncode > 0:
            raise RuntimeError(errors.decode())
        steps = [int(str(e["step"])) for e in self.events() if e["event"] == "train"]
        proper = [p for p in (self.out / "checkpoints").glob("step-*") if p.is_dir()]
        newest = max((int(p.name.removeprefix("step-")) for p in proper), default=0)
        return Kill(seconds, steps[-1] if steps else 0, newest, len(self._leftovers() - before))

    def _leftovers(self) -> set[Path]:
        return {p for p in self.out.rglob(".*") if p.name.endswith((".tmp", ".old"))}

    def weights(self) -> bytes:
        """The finished model's file."""
        return (self.out / "model" / "model.safetensors").read_bytes()


def study(
    start: list[str],
    folder: Path,
    kills: int,
    moments: random.Random,
    spawn: Callable[[list[str]], Any] = program,
) -> Iterator[Kill | bool]:
    """Kills a run again and again.

    Args:
        start: The command line that starts the run, without `--out`.
        folder: An empty folder for two run folders.
        kills: How often to kill.
        moments: Draws the moments.
        spawn: Begins a process with a command line.

    Yields:
        Each kill, and at last whether the weights equal those of an undisturbed run.
    """
    whole, broken = (Run(start, folder / name, spawn) for name in ("whole", "broken"))
    seconds = whole.finish()
    for _ in range(kills):
        # On average all kills together come to half of the run, so that it does not end before the last.
        kill = broken.kill(moments.uniform(0, seconds / kills))
        if kill is None:
            break
        yield kill
    broken.finish()
    yield whole.weights() == broken.weights()


def main() -> int:
    """Runs both studies; the exit code."""
    o = tyro.cli(Options)
    moments = random.Random(o.seed)
    good = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        steps = ["--steps", str(o.steps)]
        teacher = Run(["train", *NET, *RUN, "--steps", "50"], folder / "teacher")
        teacher.finish()
        starts = {
            "train": ["train", *NET, *RUN, *steps],
            "distill": ["distill", "--teacher", str(teacher.out), *RUN, *steps],
        }
        for verb, start in starts.items():
            (folder / verb).mkdir()
            began = time.perf_counter()
            print(f"\n| {verb}: kill | after s | step reached | checkpoint used | left torn |", flush=True)
            print("|---|---|---|---|---|")
            count, torn = 0, 0
            for kill in study(start, folder / verb, o.kills, moments):
                if isinstance(kill, bool):
                    good &= kill and count == o.kills
                    verdict = "equal those" if kill else "DIFFER from those"
                    print(
                        f"\n{verb}: after {count} kills, {torn} of them in the middle of a write, the weights"
                    )
                    print(
                        f"{verdict} of an undisturbed run ({time.perf_counter() - began:.0f} s)", flush=True
                    )
                    continue
                count, torn = count + 1, torn + (kill.torn > 0)
                row = [f"{kill.seconds:.3f}", str(kill.step), str(kill.checkpoint), str(kill.torn)]
                print(f"| {count} | {' | '.join(row)} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
