"""A few training steps of a student of a tiny pipeline, and what must hold after them."""

from __future__ import annotations

import math
from typing import Any

import torch

import distmatch as dm
from distmatch.data.batches import Batch, Pool
from distmatch.methods.settings import FakeScoreSettings
from distmatch.methods.table import METHODS

PROMPTS = ["a red cat", "the dog sleeps"]
NAMED = ("f-distill", "dmd2", "sid", "sida", "consistency", "rcm")
PIPELINES = ("stable-diffusion-3", "stable-diffusion", "wan")
STEPS = (1, 2, 4)
OWN: dict[str, dict[str, Any]] = {
    "dmd": {"pairs": 4, "pair_steps": 2},
    "disback": {"backtrack": 2, "backtrack_degrade_steps": 1, "backtrack_interval": 1},
}


def batch(teacher: Any, step: int = 0) -> Batch:
    gen = torch.Generator().manual_seed(step)
    told = teacher.pipeline.encode(PROMPTS)
    return Batch(torch.randn(2, *teacher.shape, generator=gen), told, pool=Pool(2, told.index))


def trained(teacher: Any, method: str, train: str, steps: int, updates: int = 2) -> Any:
    """A method after steps that move its student so often, checked; the method and its state.

    All numbers are finite, every update has a gradient, adapters alone move with ``lora``, the teacher and
    the fake score's base do not, and the student samples in so many calls from the teacher's largest level.
    """
    options: dict[str, Any] = {"guidance": 2.0, "guidance_rescale": 0.5, "num_steps": steps, "train": train}
    options |= {"fake_score_steps": 2} if issubclass(METHODS[method].settings, FakeScoreSettings) else {}
    options |= {"lora_rank": 2} if train == "lora" else {}
    built: Any = dm.methods.build(teacher, method, total_steps=60, **options, **OWN.get(method, {}))
    state = built.init(0)
    before = {name: p.detach().clone() for name, p in state.student.named_parameters()}
    frozen = [p.detach().clone() for p in teacher.parameters()]
    norms: list[float] = []
    while len(norms) < updates:
        assert state.step < 10
        info = built.step(state, batch(teacher, state.step))
        assert all(math.isfinite(float(value)) for value in info.values() if value.ndim == 0)
        norms += [float(info["grad_norm_student"])] if "grad_norm_student" in info else []
    assert all(norm > 0 for norm in norms)
    moved = {n for n, p in state.student.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert train == "full" or all("lora" in name for name in moved)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), frozen, strict=True))
    student = built.result(state)
    assert len(student.sigmas) == steps
    assert student.sigmas[0] == teacher.sigma_max
    x = student.sample(1, conditioning=teacher.pipeline.encode(PROMPTS[:1]), decode=False)
    assert bool(x.isfinite().all())
    return built, state
