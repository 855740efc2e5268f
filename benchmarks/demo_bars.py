"""Does the demo reach its bars? Runs the full `distmatch demo` for several seeds and checks each.

    python benchmarks/demo_bars.py --seeds 0 1

Bars: student fd at most 1.15 times the teacher's at 35 calls, recall at least 0.85 times the teacher's,
label accuracy at least 0.97, sampling at least 15 times faster, and at most 6 minutes in all. Exit code 1 on
a miss.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1)
    out: Path | None = None
    """Where the run folders go; unset takes a temporary folder."""


def main() -> None:
    """Runs the demos one after the other and prints a row each."""
    o = tyro.cli(Options)
    out = o.out or Path(tempfile.mkdtemp(prefix="demo-bars-"))
    print("| seed | fd student / teacher | recall student / teacher | accuracy | speed-up | seconds | bars |")
    print("|---|---|---|---|---|---|---|", flush=True)
    missed = False
    for seed in o.seeds:
        run = out / f"seed{seed}"
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "distmatch",
            "demo",
            "--seed",
            str(seed),
            "--out",
            str(run),
            "--overwrite",
        ]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        metrics = json.loads((run / "metrics.json").read_text())
        teacher, student = metrics["teacher"], metrics["student"]
        fd = student["fd"]["value"] / teacher["fd"]["value"]
        recall = student["recall"]["value"] / teacher["recall"]["value"]
        accuracy = student["label_accuracy"]["value"]
        speed = teacher["seconds_per_1000"] / student["seconds_per_1000"]
        reached = fd <= 1.15 and recall >= 0.85 and accuracy >= 0.97 and speed >= 15 and seconds <= 360
        missed |= not reached
        print(
            f"| {seed} | {student['fd']['value']:.4f} / {teacher['fd']['value']:.4f} = {fd:.3f} "
            f"| {student['recall']['value']:.3f} / {teacher['recall']['value']:.3f} = {recall:.3f} "
            f"| {accuracy:.3f} | {speed:.0f}x | {seconds:.0f} | {'reached' if reached else 'MISSED'} |",
            flush=True,
        )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
