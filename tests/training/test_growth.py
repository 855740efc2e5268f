"""Memory does not grow with the steps of a run, nor with its checkpoints."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

import distmatch as dm
from distmatch.training.loop import Averages
from distmatch.training.packing import pack, unpack
from tests.helpers.processes import together


def test_packing_keeps_nothing() -> None:
    """Without a garbage collection: what is large must not wait for one."""
    gc.disable()
    try:
        tree = {"a": [torch.ones(3), torch.ones(2, dtype=torch.complex64)], "b": (torch.zeros(2),)}
        tensors, structure = pack(tree)
        restored = unpack(tensors, structure)
        held = [weakref.ref(tensor) for tensor in (*tensors.values(), *restored["a"], *restored["b"])]
        del tensors, structure, restored
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def _resident() -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def _train(folder: str) -> None:
    torch.set_num_threads(1)
    seen, add = [], Averages.add

    def counted(self: Averages, info: dict[str, torch.Tensor]) -> None:
        add(self, info)
        seen.append(_resident())

    tiny = {"net": "mlp", "width": 64, "depth": 2, "batch": 64, "quiet": True}
    teacher = dm.train("ring8", steps=2, **tiny)
    Averages.add = counted  # type: ignore[method-assign]
    dm.distill(
        teacher,
        "ring8",
        steps=400,
        batch=64,
        checkpoint_every=50,
        log_every=10,
        out=f"{folder}/run",
        quiet=True,
    )
    grown = seen[-1] - seen[150]
    assert grown < 1.5, f"{grown:.2f} MiB in 250 steps"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_a_run_does_not_grow(tmp_path: Path) -> None:
    """Over 250 steps with 5 checkpoints; 24 KiB that each step leaves behind would be 6 MiB."""
    together(_train, [(str(tmp_path),)])
