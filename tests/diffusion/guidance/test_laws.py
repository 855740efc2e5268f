"""One law for every guidance: led away from an equal model, a solve is the plain solve. Seeds are fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.diffusion.composition.feynman_kac import feynman_kac
from distmatch.diffusion.composition.superdiff import superpose
from distmatch.diffusion.composition.targets import geometric
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.guidance import ClassifierGuided, GradientFree, Guided, minority_guided
from distmatch.diffusion.guidance.reflection import reflect, solve_reflected
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve

TEACHER = GaussianMixture([0.4, 0.6], [[-1.0, 0.2], [1.0, 0.5]], [0.05, 0.1], [0, 1], sigma_max=20.0)
START = 20 * torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 2
LEVELS = grid("karras", 30, 0.01, 20.0)
NOISE = SampleNoise(0, torch.arange(64), (2,))


class Alike:
    """A model whose classes are all the whole mixture: with and without a class it is one model."""

    num_classes = 2

    def __init__(self) -> None:
        for name in ("shape", "sigma_data", "sigma_min", "sigma_max"):
            setattr(self, name, getattr(TEACHER, name))

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return TEACHER(x, sigma)


def undecided(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    return torch.zeros(len(x), 2, dtype=x.dtype)


ALIKE: Any = Alike()
WRAPPERS: dict[str, tuple[Callable[[], Denoiser], Any]] = {
    "autoguidance": (lambda: Guided(TEACHER, 3.0, reference=TEACHER), TEACHER),
    "away from": (lambda: Guided(TEACHER, -2.0, reference=TEACHER), TEACHER),
    "in an interval": (lambda: Guided(TEACHER, 3.0, reference=TEACHER, interval=(0.1, 2.0)), TEACHER),
    "classifier-free": (lambda: Guided(ALIKE, 3.0), ALIKE),
    "classifier": (lambda: ClassifierGuided(ALIKE, undecided, 3.0, num_classes=2), ALIKE),
    "clean classifier": (lambda: ClassifierGuided(ALIKE, undecided, 3.0, num_classes=2, on="clean"), ALIKE),
    "gradient-free": (lambda: GradientFree(ALIKE, undecided, 3.0), ALIKE),
    "gradient-free, weak": (lambda: GradientFree(ALIKE, undecided, 3.0, reference=ALIKE), ALIKE),
    "minority": (lambda: minority_guided(TEACHER, undecided, 3.0, num_classes=2), TEACHER),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_guided_by_an_equal_model_a_solve_is_the_plain_one(name: str, solver: str) -> None:
    if (name, solver) == ("in an interval", "unipc"):
        return  # a solver with a memory starts anew at the ends of an interval
    make, plain = WRAPPERS[name]
    guided = solve(make(), START, LEVELS, solver, conditioning=LABELS).y
    torch.testing.assert_close(guided, solve(plain, START, LEVELS, solver, conditioning=LABELS).y)


def test_two_equal_models_are_one_in_a_composition() -> None:
    labels = {"conditions": [LABELS, LABELS]}
    plain = solve(TEACHER, START, LEVELS, "reverse-diffusion", conditioning=LABELS, noise=NOISE).y
    for mode in ("or", "and"):
        both = superpose([TEACHER, TEACHER], START, LEVELS, NOISE, mode, **labels)  # type: ignore[arg-type]
        torch.testing.assert_close(both.y, plain, rtol=1e-6, atol=1e-6)
    target = geometric(TEACHER, TEACHER, 2.5, LABELS, LABELS)
    done = feynman_kac(target, LEVELS[:-1], NOISE, start=START)
    end = solve(TEACHER, START, LEVELS[:-1], "reverse-diffusion", conditioning=LABELS, noise=NOISE).y
    torch.testing.assert_close(done.y, end, rtol=1e-6, atol=1e-6)
    assert float(done.log_w.std()) < 1e-8


@pytest.mark.parametrize(("weak_at", "off"), [("start", 0.02), ("end", 0.12)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_an_equal_model_reflects_a_solve_nearly_into_the_plain_one(
    weak_at: Any, off: float, scale: float
) -> None:
    """N(0, scale^2): 50 steps of DDIM end with a standard deviation of 0.950, where 1 is exact; reflected at
    the start of the step 0.945, at its end 0.855."""
    exact = GaussianMixture([1.0], [[0.0, 0.0]], [scale**2], sigma_max=80 * scale)
    y = 80 * scale * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = grid("karras", 50, 0.002 * scale, 80 * scale)
    plain = solve(exact, y, levels, "ddim").y
    mirrored = solve_reflected(exact, exact, y, levels, "ddim", weak_at=weak_at).y
    assert float(mirrored.std() / plain.std()) == pytest.approx(1, abs=off)


def test_the_weak_model_is_called_with_what_it_would_see_at_its_level() -> None:
    """The published step: latents of a variance-preserving path, given to the weak model as they are."""
    now, after, spread = 5.0, 3.0, 1.0

    def noise_of_latents(x: Tensor, level: float) -> Tensor:
        """eps of unit-variance latents x = y / sqrt(1 + sigma^2)."""
        y = x * (1 + level**2) ** 0.5
        return (y - TEACHER(y, level)) / level

    x = START / 20
    ahead = x * (1 + now**2) ** 0.5
    ahead = ahead + (after - now) * noise_of_latents(x, now)
    latents = ahead / (1 + after**2) ** 0.5
    theirs = ahead + (now - after) * noise_of_latents(latents, now)
    ours = reflect(TEACHER, TEACHER, x * (1 + now**2) ** 0.5, now, after, sigma_data=spread)
    torch.testing.assert_close(ours, theirs)
