"""Is a run lost by what happens to processes, disks, networks and clocks?

    python benchmarks/faults/run.py

Each fault is injected into a tiny run or into the writing of a store. The command that continues it follows,
and the result is compared with that of an undisturbed run: to the bit in one process, to 1e-5 (relative) in
several, whose sums have another order. A fault also counts as lost where the exit code is wrong, a process
hangs, or there is a traceback or more than one message. Exit code 1 when anything is lost.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import alone
import together
import tyro
from launches import PRELOADED, SERVER


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to inject."""

    scale: float = 1.0
    """How many faults of each kind, as a multiple."""
    seed: int = 0
    """Of the moments."""
    kinds: tuple[str, ...] = ()
    """Functions of alone.py and together.py; all without any."""
    seconds: float = 3600
    """No further fault after this time."""


def main() -> int:
    """Injects, prints a row for each fault and a table; the exit code."""
    o = tyro.cli(Options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as the command line sets it before it imports torch
    SERVER.set_forkserver_preload(PRELOADED)
    found: dict[str, list[alone.Outcome]] = defaultdict(list)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        shared = alone.Place(Path(place), random.Random(o.seed))
        for kind in (*alone.KINDS, *together.KINDS):
            if o.kinds and kind.__name__ not in o.kinds:
                continue
            for case in kind(shared, o.scale):
                if time.monotonic() - began > o.seconds:
                    break
                try:
                    outcome = case()
                except Exception as error:  # of the injection: not survived either
                    outcome = alone.Outcome(kind.__name__, "?", "", f"{type(error).__name__}: {error}")
                found[outcome.kind].append(outcome)
                state = f"LOST: {outcome.lost}" if outcome.lost else "survived"
                print(f"{outcome.kind}: {outcome.what}: {state} | {outcome.message}", flush=True)
    print("\n| kind | injected | lost | longest, s | message |\n|---|---|---|---|---|")
    for kind, those in found.items():
        injected = [one for one in those if not one.what.startswith("skipped")]
        lost = sum(bool(one.lost) for one in injected)
        seconds = [one.seconds for one in injected if one.seconds is not None]
        longest = f"{max(seconds):.1f}" if seconds else ""
        message = next((one.message for one in injected if one.message != "none"), "none")
        print(f"| {kind} | {len(injected)} | {lost} | {longest} | {message} |")
    every = [one for those in found.values() for one in those if not one.what.startswith("skipped")]
    lost = sum(bool(one.lost) for one in every)
    print(f"\n{len(every)} faults, {lost} lost, {time.monotonic() - began:.0f} s")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
