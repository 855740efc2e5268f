"""``teacher.sample``: of networks, of any module, and guided."""

from __future__ import annotations

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.solvers import sample_teacher
from tests.helpers.small import network_teacher


def test_it_is_sample_teacher() -> None:
    teacher = network_teacher(2)
    labels = torch.arange(12) % 2
    for model in (teacher, Guided(teacher, 2.0)):
        found = model.sample(12, seed=3, conditioning=labels, steps=4, solver="dpmpp-2m", batch=5)
        expected = sample_teacher(model, 12, seed=3, conditioning=labels, steps=4, solver="dpmpp-2m", batch=5)
        assert torch.equal(found, expected)


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="label"):
        network_teacher(2).sample(3, conditioning=torch.tensor([0, 1, 7]), steps=2)
