"""How long a checkpoint holds up training: written in the background, and before the next step.

    python benchmarks/checkpoints.py

A teacher's state (weights, average, Adam's moments) is written several times between steps; printed are the
milliseconds that a step waits, and those until the checkpoint is on the disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from distmatch.base.ranks import ALONE
from distmatch.data.batches import Batch
from distmatch.nets.config import MLPConfig
from distmatch.training.checkpoint import save_checkpoint
from distmatch.training.options import TeacherConfig
from distmatch.training.saving import Saver
from distmatch.training.teacher import TeacherTraining

REPEATS = 5


def main() -> None:
    """Prints the table."""
    training = TeacherTraining(
        config=TeacherConfig(),
        net=MLPConfig(width=768, depth=6),
        shape=(64,),
        num_classes=0,
        sigma_data=0.5,
        total_steps=100,
        device=torch.device("cpu"),
    )
    state = training.init(0)
    batch = Batch(torch.randn(32, 64))
    training.step(state, batch)
    numbers = sum(t.numel() for t in state.tensors())
    steps, waits, wholes, plain = [], [], [], []
    with tempfile.TemporaryDirectory() as place:
        saver = Saver(Path(place), ALONE, keep=1)
        for _ in range(REPEATS):
            began = time.perf_counter()
            training.step(state, batch)
            steps.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.save(state.step, state.state_dict(), None)
            waits.append(time.perf_counter() - began)
            saver.finish()
            wholes.append(time.perf_counter() - began)
            training.step(state, batch)
            began = time.perf_counter()
            save_checkpoint(Path(place), state.step, state.state_dict(), keep=1)
            plain.append(time.perf_counter() - began)
    rows = {
        "a step": steps,
        "a step waits for a checkpoint": waits,
        "the checkpoint is on the disk after": wholes,
        "written before the next step": plain,
    }
    print(
        f"{numbers / 1e6:.0f} million weights and averages, as many moments again; medians of {REPEATS}, ms"
    )
    for name, seconds in rows.items():
        print(f"{name:38} {1e3 * statistics.median(seconds):8.1f}")


if __name__ == "__main__":
    main()
