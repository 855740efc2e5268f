"""How any solver runs: calls, pieces, visitors, memory, precision, no waiting. Fixed seeds."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmatch.base.errors import UserError
from distmatch.diffusion.guidance import CallCounter, Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import (
    ALIASES,
    SOLVERS,
    PredictorCorrector,
    Solver,
    UniPC,
    find_solver,
    grid,
    solve,
)
from distmatch.diffusion.solvers.names import canonical_name
from tests.reference.solver_cases import DETERMINISTIC, MIXTURE, START, STOCHASTIC, Normal, noise_for


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_calls_are_counted_and_are_those_announced(name: str) -> None:
    for levels in (grid("karras", 8, 0.1, 5.0), grid("karras", 8, 0.1, 5.0, to_zero=False)):
        done = solve(MIXTURE, START, levels, name, noise=noise_for(START), path="vp")
        assert done.calls == find_solver(name).calls(tuple(levels.tolist()))
        assert bool(done.y.isfinite().all())


def test_a_guided_call_counts_as_two_and_a_counter_is_not_wrapped_again() -> None:
    teacher = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.04, 0.09], [0, 1])
    labels = torch.zeros(len(START), dtype=torch.int64)
    levels = grid("karras", 6, 0.1, 5.0)
    counter = CallCounter(Guided(teacher, 2.0))
    counter.calls = 5
    assert solve(counter, START, levels, "ddim", conditioning=labels).calls == 12
    assert counter.calls == 17
    assert solve(Guided(teacher, 2.0), START, levels, "ddim", conditioning=labels).calls == 12


@pytest.mark.parametrize("name", ["heun", "ddim", "rhork:rk4", "heun:20", "ddim:1", "pc", "euler-maruyama"])
def test_two_halves_are_the_whole(name: str) -> None:
    levels, noise = grid("karras", 9, 0.05, 10.0), noise_for(START)
    solver = find_solver(name)
    if name == "heun:20":  # churn is shared out over the steps of a run: 5 of 9 get 5/9 of it
        whole_churn = find_solver("heun:9")
        half = [find_solver("heun:4"), find_solver("heun:5")]
    else:
        whole_churn, half = solver, [solver, solver]
    whole = solve(MIXTURE, START, levels, whole_churn, noise=noise, trajectory=True)
    first = solve(MIXTURE, START, levels[:5], half[0], noise=noise)
    second = solve(MIXTURE, first.y, levels[4:], half[1], noise=noise.after(4))
    assert torch.equal(first.y, whole.trajectory[4])
    assert torch.equal(second.y, whole.y)
    assert first.calls + second.calls == whole.calls


def test_a_visitor_sees_every_step_and_may_replace_the_state() -> None:
    levels, seen = grid("karras", 6, 0.1, 5.0), []

    def pin(k: int, y: Tensor) -> Tensor:
        seen.append(k)
        return torch.where(torch.arange(len(y))[:, None] < 3, 0.25, y)

    pinned = solve(MIXTURE, START, levels, "ddim", on_step=pin, trajectory=True)
    assert seen == list(range(6))
    assert bool((pinned.trajectory[1:, :3] == 0.25).all())
    assert torch.equal(pinned.y[3:], solve(MIXTURE, START, levels, "ddim").y[3:])


class Watching(TorchDispatchMode):
    """Counts how many results of torch operations are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.alive.add(out)
            self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_memory_does_not_grow_with_the_steps(name: str) -> None:
    y, most = torch.ones(3, 2), []
    for steps in (8, 40):
        model, watching = Normal(), Watching()
        with watching:
            done = solve(model, y, grid("karras", steps, 0.1, 5.0), name, noise=noise_for(y), path="vp")
        most.append(watching.most)
        assert model.dtypes == {torch.float32}
        assert done.y.dtype == torch.float32
        assert done.trajectory is None
        del done
    assert most[0] == most[1]


def test_the_state_is_kept_in_float64_between_calls() -> None:
    class Still:
        shape, num_classes, sigma_data, sigma_min, sigma_max = (1,), 0, 1.0, 0.002, 80.0

        def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
            return torch.zeros_like(x)

    # y shrinks by s'/s in each of 20,000 steps; float32 states would drift by about sqrt(steps) roundings.
    y = torch.linspace(1, 2, 50)[:, None]
    end = solve(Still(), y, grid("log", 20_000, 0.5, 1.0, to_zero=False), "ddim").y
    torch.testing.assert_close(end, y / 2, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC, PredictorCorrector(norm="batch")])
def test_no_step_waits_for_the_device(name: str | Solver) -> None:
    # Tensors on the meta device have no values: reading one, as .item() or a branch does, raises.
    y = torch.empty(4, 2, device="meta")
    noise = SampleNoise(0, torch.arange(4), (2,), "meta")
    with pytest.raises(RuntimeError, match="meta"):
        y.sum().item()
    done = solve(Normal(), y, grid("karras", 6, 0.1, 5.0), name, noise=noise, path="vp")
    assert done.y.device.type == "meta"


def test_solvers_answer_to_what_the_field_calls_them() -> None:
    names = {
        "dpmpp-2m": ("dpm++", "DPM-Solver++", "dpmsolver++", "DPM++ 2M", "dpmpp_2m"),
        "dpmpp-2m-sde": ("DPM++ 2M SDE", "sde-dpmsolver++"),
        "ddim:1": ("euler_ancestral", "Euler a", "DDPM"),
        "unipc:2": ("UniPC", "uni_pc"),
        "deis:2": ("DEIS",),
    }
    for name, others in names.items():
        assert all(find_solver(other) == find_solver(name) for other in others), name
    assert find_solver("unipc:3") == UniPC(3)
    for known in SOLVERS:
        assert canonical_name(known) == known
    assert all(find_solver(alias) for alias in ALIASES)
    with pytest.raises(UserError, match=r"'ddin'.*did you mean ddim"):
        find_solver("ddin")


def test_unipc_does_not_correct_a_state_that_was_changed() -> None:
    """What a caller wrote into the state stays; a corrector would take the step to it again, without it."""
    levels = grid("karras", 8, 0.05, 10.0)

    def moved(k: int, y: Tensor) -> Tensor | None:
        return y + 0.5 if k == 3 else None

    first = solve(MIXTURE, START, levels[:5], "unipc").y
    whole = solve(MIXTURE, START, levels, "unipc", on_step=moved, trajectory=True)
    torch.testing.assert_close(whole.trajectory[4], first + 0.5)
    clean = MIXTURE(whole.trajectory[4], levels[4])
    # The next step starts from the changed state: the predictor of order 2, as 2M takes it.
    before = MIXTURE(whole.trajectory[3], levels[3])
    h, r = (math.log(levels[k] / levels[k + 1]) for k in (4, 3))
    target = clean + 0.5 * h / r * (clean - before)
    there = target + levels[5] / levels[4] * (whole.trajectory[4] - target)
    torch.testing.assert_close(whole.trajectory[5], there)
