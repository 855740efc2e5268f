"""The consistency family on networks from elsewhere: derivatives get through them, and students are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.interop.diffusers_teacher import teacher_from
from distmatch.methods.consistency import tangents
from distmatch.methods.consistency.tangents import derivative_along
from distmatch.methods.student import Student
from tests.helpers.small import batch, distiller


def diffusers_teacher() -> Any:
    diffusers = pytest.importorskip("diffusers")
    from tests.helpers.diffusers_models import unet

    model = unet(in_channels=1, out_channels=1)
    return teacher_from(model, diffusers.FlowMatchEulerDiscreteScheduler())


def test_forward_mode_gets_through_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = diffusers_teacher()
    method = distiller(teacher, method="scm")
    assert method.notes() == {"tangent": "exact"}
    student = method.init(0).student.denoiser
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 9.0])
    assert torch.allclose(student(x, sigma), teacher(x, sigma), rtol=0, atol=1e-5)
    _, exact = derivative_along(student, x, sigma, x, sigma)
    _, difference = derivative_along(student, x, sigma, x, sigma, how="difference")
    # The network rounds its times, about 500, to float32: 3e-5, while a step of the difference is about 0.05.
    assert (exact - difference).norm() < 2e-3 * exact.norm()
    # Where forward mode fails, differences take its place with a warning, unless it was asked for.
    monkeypatch.setattr(tangents, "allow_forward_mode", lambda denoiser: [])
    with pytest.warns(UserWarning, match="differences in float64 are used"):
        assert distiller(teacher, method="scm").notes() == {"tangent": "difference"}
    with pytest.raises(UserError, match="--tangent difference"):
        distiller(teacher, method="scm", tangent="exact")


@pytest.mark.parametrize("method", ["consistency", "scm", "rcm"])
def test_students_of_diffusers_train_and_are_saved(method: str, tmp_path: Path) -> None:
    made = distiller(diffusers_teacher(), method=method)
    state = made.init(0)
    for step in range(2):
        info = made.step(state, batch(step, n=4, shape=(1, 8, 8)))
    assert torch.isfinite(info["loss"])
    student = made.result(state, {})
    student.save_pretrained(str(tmp_path / "m"))
    again = Student.from_pretrained(str(tmp_path / "m"))
    assert torch.allclose(again.sample(2, seed=0), student.sample(2, seed=0), atol=1e-6)
