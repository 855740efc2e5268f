"""No step of a composition waits for the device: tensors on the meta device have no values to read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmatch.diffusion.composition.feynman_kac import feynman_kac
from distmatch.diffusion.composition.superdiff import superpose
from distmatch.diffusion.composition.targets import Target
from distmatch.diffusion.control.forward_model import ObservationGuided
from distmatch.diffusion.control.inpainting import Replacement
from distmatch.diffusion.control.inverse import LinearPosterior
from distmatch.diffusion.control.linear import observed
from distmatch.diffusion.control.translate import translate
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve


class Normal:
    """The denoiser of N(mean, 1), on any device."""

    shape = (2,)
    num_classes, sigma_data, sigma_min, sigma_max = 0, 1.0, 0.002, 80.0

    def __init__(self, mean: float = 0.0) -> None:
        self.mean = mean

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return self.mean + (x - self.mean) / (1 + sigma[:, None] ** 2)


Y = torch.empty(4, 2, device="meta")
NOISE = SampleNoise(0, torch.arange(4), (2,), "meta")
LEVELS = grid("karras", 5, 0.1, 5.0)


@pytest.mark.parametrize("mode", ["or", "and"])
def test_superpositions_do_not_wait(mode: str) -> None:
    models = [Normal(), Normal(1.0), Normal(-2.0)]
    done = superpose(models, Y, LEVELS, NOISE, mode)  # type: ignore[arg-type]
    assert done.y.device.type == done.log_q.device.type == "meta"


def test_particles_do_not_wait() -> None:
    target = Target([Normal(), Normal(1.0)], [2.0, -0.5], reward=lambda x: x.sum(1))
    assert feynman_kac(target, LEVELS[:-1], NOISE, populations=2).y.device.type == "meta"


def test_control_does_not_wait() -> None:
    known, value = observed(torch.tensor([True, False]), (2,)), torch.zeros(1)
    assert solve(LinearPosterior(Normal(), known, value), Y, LEVELS, "heun").y.device.type == "meta"
    drawn = ObservationGuided(Normal(), lambda x: x.square(), torch.zeros(2), 1.0)
    assert solve(drawn, Y, LEVELS, "heun").y.device.type == "meta"
    keep = Replacement(known, value, LEVELS, NOISE)
    assert solve(Normal(), keep.start(Y), LEVELS, "heun", on_step=keep).y.device.type == "meta"
    assert translate(Normal(), Normal(1.0), Y, LEVELS, NOISE).device.type == "meta"
