"""A part of a set of samples drawn alone is that part of the whole, for every kind of sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.data.toys import toy
from distmatch.diffusion.pfgm import StudentTTeacher
from distmatch.diffusion.solvers import sample_teacher
from distmatch.methods.hybrid import hybrid_sample
from distmatch.methods.student import Student
from tests.helpers.small import network_teacher

RING: Any = toy("ring8")
LATENT: Any = StudentTTeacher(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), 3.0)
STUDENT = Student(network_teacher(classes=2), (20.0, 3.0, 0.8))
PLAIN = Student(network_teacher(), (20.0, 3.0))

Sampler = Callable[..., Tensor]
SAMPLERS: dict[str, Sampler] = {
    "teacher": lambda n, **how: sample_teacher(RING, n, steps=4, **how),
    "stochastic solver": lambda n, **how: sample_teacher(RING, n, steps=4, solver="dpmpp-2m-sde", **how),
    "pfgm": lambda n, **how: sample_teacher(LATENT, n, steps=4, **how),
    "student of classes": STUDENT.sample,
    "hybrid": lambda n, **how: hybrid_sample(RING, PLAIN, n, steps=4, **how),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_part_is_the_part_of_the_whole(name: str) -> None:
    whole = SAMPLERS[name](60, seed=4, batch=10)
    assert torch.equal(SAMPLERS[name](20, seed=4, batch=10, first=30), whole[30:50])
