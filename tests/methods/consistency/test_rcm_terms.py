"""The two terms of rCM: their balance, and the score difference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from distmatch.data.batches import Batch
from tests.helpers.small import batch, distiller, network_teacher, read_by


@pytest.mark.parametrize("dimensions", [2, 64])
@pytest.mark.parametrize("at", [4, 400])
def test_rcm_balances_its_two_terms_as_the_authors_do(dimensions: int, at: int) -> None:
    """Both as the authors' sums over elements, in TrigFlow's unit, at any number of dimensions and step."""
    teacher = network_teacher(shape=(dimensions,))
    settings = {"fake_score_steps": 1, "grad_clip": 0.0, "lr": 1.0, "dmd_weight": 0.3, "student_sigma": 5.0}
    method = distiller(teacher, method="rcm", **settings)
    state = method.init(0)
    student, unit = state.student.denoiser, teacher.sigma_data
    with torch.no_grad():  # a fake score and a student that are not the teacher's
        for network, factor in ((state.fake_score, 1.2), (student, 0.9)):
            for parameter in network.parameters():
                parameter.mul_(factor)
    assert "uncertainty" not in state.extra  # nothing that learns to weigh one term changes the balance
    state.optimizers["student"] = torch.optim.SGD(student.parameters())
    state.step = at
    again = torch.Generator()
    again.set_state(state.generator.get_state())
    data = torch.randn(32, dimensions, generator=torch.Generator().manual_seed(1))

    # The score difference, then the tangent, from the numbers that the step will draw.
    fresh = torch.randn(32, dimensions, generator=again)
    x0 = student(state.student.sigmas[0] * fresh, torch.full((32,), state.student.sigmas[0]))
    sigma = method.noise.sample(32, again)[:, None]
    noised = x0.detach() + sigma * torch.randn(32, dimensions, generator=again)
    with torch.no_grad():
        real, fake = teacher(noised, sigma[:, 0]), state.fake_score(noised, sigma[:, 0])
    d = (fake - real) / (x0.detach() - real).abs().mean(dim=1, keepdim=True)
    x = x0 / unit
    dmd = (x - (x - d).detach()).square().sum(dim=1)
    t = torch.atan(method.terms[0]._levels(32, SimpleNamespace(generator=again, ranks=state.ranks)) / unit)[
        :, None
    ]
    y = data + unit * t.tan() * torch.randn(32, dimensions, generator=again)

    def output(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # F of TrigFlow, x_t = cos t y
        return (t.cos() ** 2 * y - student(y, unit * t[:, 0].tan())) / (unit * t.sin())

    with torch.no_grad():
        follow = teacher(y, unit * t[:, 0].tan())
    velocity = (t.cos() ** 2 * y - follow) / t.sin()  # dx_t/dt of the teacher
    step = 1e-2 * t
    ahead, behind = (
        output((t.cos() * y + sign * step * velocity) / (t + sign * step).cos(), t + sign * step).detach()
        for sign in (1, -1)
    )
    slope, f = (ahead - behind) / (2 * step), output(y, t)
    rho = method.terms[0].warmth(at)
    g = -(t.cos() ** 2) * (unit * f.detach() - velocity)
    g = (g - rho * t.cos() * t.sin() * (t.cos() * y + unit * slope)) / unit
    scm = (f - f.detach() - g / (g.norm(dim=1, keepdim=True) + 0.1)).square().sum(dim=1)
    wanted = torch.autograd.grad((scm + 0.3 * dmd).mean() / dimensions, list(student.parameters()))

    before = parameters_to_vector(student.parameters()).detach().clone()
    method.step(state, Batch(data, None))
    moved = before - parameters_to_vector(student.parameters()).detach()
    # float32, and the derivative by differences of a hundredth of t.
    assert float((moved - parameters_to_vector(wanted)).norm() / moved.norm()) < 0.02


def test_rcm_adds_the_weighted_score_difference_of_diff_instruct() -> None:
    """Beside scm's: the same random numbers give 4 dmd_weight times the gradient of diff-instruct."""

    def gradient(name: str, at: int = 0, **settings: Any) -> torch.Tensor:
        plain = {
            "student_sigma": 0.0,
            "tangent_warmup": 0.0,
            "fake_score_steps": 1,
            "grad_clip": 0.0,
            "lr": 1.0,
        }
        method = distiller(network_teacher(), method=name, **read_by(name, **plain), **settings)
        state = method.init(0)
        state.optimizers["student"] = torch.optim.SGD(state.student.denoiser.parameters())
        with torch.no_grad():  # a fake score that is not the teacher's
            for parameter in state.fake_score.parameters():
                parameter.mul_(1.2)
        state.step = at
        before = parameters_to_vector(state.student.denoiser.parameters()).detach().clone()
        method.step(state, batch(0))
        return before - parameters_to_vector(state.student.denoiser.parameters()).detach()

    half, one, two = (gradient("rcm", dmd_weight=weight) for weight in (0.5, 1.0, 2.0))
    alone = gradient("diff-instruct")
    # Differences of sums in float32.
    torch.testing.assert_close(two - one, 4 * alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * (one - half), 4 * alone, rtol=1e-4, atol=1e-5)
    assert alone.norm() > 0.01
    assert (one - alone).norm() > 0.01  # the consistency loss
    later, never = gradient("rcm", dmd_weight=2.0, dmd_after=0.1), gradient("rcm", dmd_weight=0.0)
    assert torch.equal(later, never)
    assert not torch.equal(*(gradient("rcm", at=4, dmd_weight=2.0, dmd_after=share) for share in (0.1, 0.2)))
