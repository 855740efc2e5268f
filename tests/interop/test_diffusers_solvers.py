"""Solvers that diffusers has too take the same samples to the same place, step by step.

The model is an exact mixture in float64; diffusers keeps its levels in float32, and 1e-5 is their rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import solve
from tests.helpers.diffusers_models import diffusers

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.5]], [0.04, 0.09], sigma_max=200.0)
N = 32
START = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class SampleResult(SampleNoise):
    """The numbers that diffusers draws from a seed, one batch a step."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__(0, torch.arange(N), (2,))
        self.generator, self.kind = torch.Generator().manual_seed(seed), dtype

    def normal(self, step: int, draw: int = 0) -> Tensor:
        return torch.randn(N, 2, dtype=self.kind, generator=self.generator)


def clean(y: Tensor, sigma: Tensor) -> Tensor:
    return MIXTURE(y, sigma.double().expand(N))


def arrived(y: Tensor, sigmas: Tensor, solver: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return solve(MIXTURE, y, sigmas.double(), solver, noise=SampleResult(1, dtype)).y


def stepped(scheduler: Any, x: Tensor, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loop of a pipeline, from ``x`` on."""
    scheduler.set_begin_index(0)
    takes = {"generator": torch.Generator().manual_seed(1)}
    if "generator" not in inspect.signature(scheduler.step).parameters:
        takes = {}
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, scheduler.sigmas[scheduler.step_index or 0]), t, x, **takes).prev_sample
    return x


@pytest.mark.parametrize(
    ("solver", "order", "algorithm"),
    [
        ("dpmpp-1", 1, "dpmsolver++"),
        ("dpmpp-2m", 2, "dpmsolver++"),
        ("dpmpp-sde", 1, "sde-dpmsolver++"),
        ("dpmpp-2m-sde", 2, "sde-dpmsolver++"),
    ],
)
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver_on_the_levels_of_edm(solver: str, order: int, algorithm: str, steps: int) -> None:
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.01, sigma_max=40.0, solver_order=order, algorithm_type=algorithm
    )
    scheduler.set_timesteps(steps)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        """EDM's F, which the scheduler turns into x0 again."""
        skip = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)
        out = scheduler.precondition_outputs(torch.zeros_like(x), torch.ones_like(x), sigma)
        return (clean(x, sigma) - skip) / out

    start = scheduler.sigmas[0] * START
    theirs = stepped(scheduler, start, network)
    ours = arrived(start, scheduler.sigmas, solver)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def noise_predicted(x: Tensor, sigma: Tensor) -> Tensor:
    """eps for a state of the variance-exploding frame."""
    return (x - clean(x, sigma)) / sigma


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("dpmpp-1", {"solver_order": 1}),
        ("dpmpp-2m", {}),
        ("dpmpp-2m-sde", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_dpm_solver_on_a_variance_preserving_path(solver: str, options: dict[str, Any]) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", **options)
    scheduler.set_timesteps(16)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return noise_predicted(x * (1 + sigma**2).sqrt(), sigma)

    sigma = scheduler.sigmas[0]
    theirs = stepped(scheduler, START, network)
    # This scheduler draws in float32 whatever the samples are.
    ours = arrived(START * (1 + sigma**2).sqrt(), scheduler.sigmas, solver, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "name", "order", "error"),
    [
        *((f"unipc:{order}", "UniPCMultistepScheduler", order, 1e-6) for order in (1, 2, 3)),
        # Their weights are differences of float32 logarithms.
        *((f"deis:{order}", "DEISMultistepScheduler", order, 2e-4) for order in (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("steps", [16, 25])
def test_unipc_and_deis(solver: str, name: str, order: int, error: float, steps: int) -> None:
    scheduler = getattr(diffusers, name)(timestep_spacing="leading", solver_order=order)
    scheduler.set_timesteps(steps)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return noise_predicted(x * (1 + sigma**2).sqrt(), sigma)

    theirs = stepped(scheduler, START, network)
    last = scheduler.sigmas[-1]
    ours = arrived(START * (1 + scheduler.sigmas[0] ** 2).sqrt(), scheduler.sigmas, solver)
    torch.testing.assert_close(ours / (1 + last**2).sqrt(), theirs, rtol=0, atol=error)


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("ddim", "EulerDiscreteScheduler"),
        ("ddim:1", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
    ],
)
def test_solvers_of_the_variance_exploding_frame(solver: str, name: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(12)
    start = scheduler.sigmas[0] * START
    theirs = stepped(scheduler, start, noise_predicted)
    levels = torch.unique_consecutive(scheduler.sigmas)  # Heun's list has those of both evaluations
    torch.testing.assert_close(arrived(start, levels, solver), theirs, rtol=1e-5, atol=1e-5)
