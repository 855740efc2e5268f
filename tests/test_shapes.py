"""Samples of any shape: solvers, guidance, methods and discriminators do with (L, D), (C, H, W) and
(C, T, H, W) what they do with the same numbers in a row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distmatch as dm
from distmatch.data import Dataset, Scaling
from distmatch.diffusion.denoiser import pooled
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.hooked import as_map
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import SOLVERS, find_solver, grid, solve
from distmatch.methods.table import METHODS
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import network_teacher, read_by

SHAPES = [(4, 2), (2, 2, 2), (1, 2, 2, 2)]
N = 12


class Shaped:
    """An exact teacher of vectors, whose samples are given another shape."""

    def __init__(self, mixture: GaussianMixture, shape: tuple[int, ...]) -> None:
        self.inner, self.shape, self.num_classes = mixture, shape, mixture.num_classes
        self.sigma_data, self.sigma_min, self.sigma_max = (
            mixture.sigma_data,
            mixture.sigma_min,
            mixture.sigma_max,
        )

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Any = None) -> Tensor:
        return self.inner(x.flatten(1), sigma, conditioning).reshape(x.shape)


def exact(shape: tuple[int, ...]) -> Any:
    """Three modes in eight dimensions with two classes, its samples of some shape."""
    means = torch.randn(3, math.prod(shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixture = GaussianMixture([0.5, 0.3, 0.2], means, [0.1, 0.2, 0.05], [0, 1, 1], sigma_max=20.0)
    return Shaped(mixture, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_does_the_same_in_every_shape(solver: str, shape: tuple[int, ...]) -> None:
    def solved(shape: tuple[int, ...], guidance: float) -> Tensor:
        teacher = Guided(exact(shape), guidance)
        levels = grid("karras", 5, 0.002, 20.0)
        y = 20.0 * torch.randn(N, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        noise = SampleNoise(3, torch.arange(N), shape) if find_solver(solver).stochastic else None
        labels = torch.arange(N) % 2
        path = "vp" if solver in ("tab", "euler-maruyama", "reverse-diffusion", "pc") else None
        found = solve(
            teacher, y.reshape(N, *shape), levels, solver, conditioning=labels, noise=noise, path=path
        )
        assert found.y.shape == (N, *shape)
        return found.y.flatten(1)

    for guidance in (1.0, 1.5):
        torch.testing.assert_close(solved(shape, guidance), solved((8,), guidance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_the_same_in_every_shape(method: str, shape: tuple[int, ...]) -> None:
    """The teacher's network flattens, so that its features do not know the shape."""

    def trained(shape: tuple[int, ...]) -> Tensor:
        x = 0.7 * torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
        as_it_is = Scaling.for_images(-1, 1, "") if len(shape) > 2 else Scaling.identity(shape[-1])
        data = Dataset(x.reshape(64, *shape), torch.arange(64) % 2, ("a", "b"), "x", as_it_is)
        steps = 16 if method == "disback" else 4  # it has two phases
        quick = read_by(method, mmd_features="samples", fake_score_steps=2, lr_rampup=0, fit_steps=3)
        student = dm.distill(
            network_teacher(2, shape), data, method=method, steps=steps, batch=16, quiet=True, **quick
        )
        assert student.shape == shape
        return student.sample(6, seed=5, conditioning=torch.arange(6) % 2).flatten(1)

    assert_same_but_for_rounding(trained(shape), trained((8,)))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 8, 12), (4, 4)), ((3, 5, 8, 12), (1, 4, 4)), ((3, 4, 8, 12), (2, 2, 2)), ((3, 1, 6, 6), (1, 2, 2))],
)
def test_tokens_of_images_and_video_are_the_map_that_a_convolution_gives(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    convolution = torch.nn.Conv2d if len(strides) == 2 else torch.nn.Conv3d
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    there = convolution(3, 7, strides, strides)(x)
    tokens = there.flatten(2).transpose(1, 2)
    assert torch.equal(as_map(tokens, x), there)
    assert_same_but_for_rounding(pooled([tokens, x.flatten(1)]), pooled([there, x.flatten(1)]))
    more = torch.cat([tokens, tokens[:, :1]], dim=1)  # one of a class, which has no place
    assert as_map(more, x) is more
    assert as_map(there, x) is there


@pytest.mark.parametrize("shape", [(6, 2), (1, 8, 8), (1, 4, 4, 4)])
def test_an_adversarial_student_is_trained_on_features_of_every_shape(shape: tuple[int, ...]) -> None:
    """The transformer of the default config, its features, and heads for them."""
    kind = "sequence" if len(shape) == 2 else None
    x = torch.rand(40, *shape, generator=torch.Generator().manual_seed(0))
    data = dm.data.from_arrays(x, torch.arange(40) % 2, kind=kind)
    assert data.shape == shape
    small = {"net": "dit", "width": 24, "depth": 2, "heads": 3, "patch": 2}
    teacher = dm.train(data, steps=2, batch=8, quiet=True, **small)
    assert all(
        f.ndim == len(shape) + 1
        for f in teacher(data.batch(torch.arange(4))[0], torch.ones(4), return_features="only")
    )
    student = dm.distill(
        teacher, data, method="f-distill", steps=4, batch=8, gan_weight=0.1, fake_score_steps=2, quiet=True
    )
    found = student.sample(3, conditioning=torch.tensor([0, 1, 0]))
    assert found.shape == (3, *shape)
    assert bool(found.isfinite().all())


class OfVideo(torch.nn.Module):
    """A network of one's own on clips; ``middle`` gives maps, ``mixed`` tokens of 1 x 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = torch.nn.Conv3d(2, 6, 3, padding=1)
        self.mixed = torch.nn.Linear(24, 6)
        self.last = torch.nn.Linear(6, 4)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.log().reshape(-1, 1, 1, 1, 1).expand_as(x)
        maps = torch.nn.functional.silu(self.middle(torch.cat([x, level], 1)))
        cut = maps.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        tokens = self.mixed(cut.flatten(4).flatten(1, 3))
        out = self.last(tokens).unflatten(1, cut.shape[1:4]).unflatten(4, (2, 2))
        return out.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


def test_parts_of_a_network_of_ones_own_are_features_of_video() -> None:
    torch.manual_seed(0)
    teacher = dm.as_denoiser(
        OfVideo(), "edm", "x0", shape=(1, 3, 4, 4), sigma_data=0.5, features=("middle", "mixed")
    )
    x = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = teacher(x[:5, None], torch.ones(5), return_features="only")
    assert [tuple(f.shape) for f in found] == [(5, 6, 3, 4, 4), (5, 6, 3, 2, 2)]
    data = dm.data.from_arrays(x, kind="video")
    student = dm.distill(teacher, data, method="dmd2", steps=4, batch=8, fake_score_steps=2, quiet=True)
    assert bool(student.sample(3).isfinite().all())
