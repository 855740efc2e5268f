"""The replay of `benchmarks/step.py` does the arithmetic of a step's network calls, no less and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distmatch.methods.table import METHODS
from tests.helpers.small import batch, network_teacher


class Multiplications(TorchDispatchMode):
    """Counts the operations of matrix products while it lasts."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def work(action: Callable[[], None]) -> int:
    """Operations of an action."""
    with Multiplications() as counter:
        action()
    return counter.total


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import step

    return step


@pytest.mark.parametrize("name", [n for n in METHODS if n != "dpm-ot"])
def test_the_replay_does_the_work_of_the_step(bench: ModuleType, name: str) -> None:
    """Equal but for backward passes that end at an input, where the replay may stop a layer earlier (2 %).

    The pairwise kernels of mmd are no network calls either (6 % at this size).
    """
    teacher = network_teacher(2, (8,))
    method, steps = bench.build(name, teacher, bench.Options(), torch.device("cpu"))
    state = method.init(0)

    def ours() -> None:
        for _ in range(steps):
            method.step(state, batch(0, 2, 32, (8,)))

    for _ in range(2):
        ours()
    with bench.recorded(bench.networks_of(teacher, state)) as calls:
        done = work(ours)
    share = work(bench.replay(calls)) / done
    assert 0.97 < share <= 1.0 or (name == "mmd" and share > 0.7), bench.counted(calls)


def test_updates_are_as_many_as_in_a_cycle_and_train_nothing(bench: ModuleType) -> None:
    method, steps = bench.build("f-distill", network_teacher(), bench.Options(), torch.device("cpu"))
    state, moves = method.init(0), Counter[str]()

    def ours() -> None:
        for _ in range(steps):
            method.step(state, batch(0))

    ours()
    again = bench.updates_of(state, ours)
    before = {
        k: v.clone() for name, net in state.modules().items() for k, v in flat(name, net.state_dict()).items()
    }
    for name, optimizer in state.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: moves.update([name]))
    again()
    assert moves == {"student": 1, "fake": steps, "ratio": steps}
    for name, net in state.modules().items():
        assert all(torch.equal(v, before[k]) for k, v in flat(name, net.state_dict()).items())


def flat(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in tensors.items()}


def test_calls_are_told_apart(bench: ModuleType) -> None:
    net = network_teacher().requires_grad_(True)
    x, sigma = torch.randn(4, 2), torch.ones(4)
    with bench.recorded({"net": net}) as calls:
        with torch.no_grad():
            net(x, sigma)
        net(x, sigma).sum().backward()
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(net(leaf, sigma).sum(), leaf)
        net(leaf, sigma).sum().backward()
        torch.autograd.grad(net(x, sigma).sum(), list(net.parameters()), allow_unused=True)
        with torch.no_grad():
            torch.func.jvp(lambda y: net(y, sigma), (x,), (x,))
        _, features = net(leaf, sigma, return_features=True)
        torch.autograd.grad(features[0].sum(), leaf)
        torch.autograd.grad(net(leaf, sigma, return_features="only")[0].sum(), leaf)
    kinds = ["forward", "backward to weights", "backward to input", "backward to weights and input"]
    kinds += ["backward to weights", "jvp", "backward to input", "features, backward to input"]
    assert [call.kind for call in calls] == kinds
    assert "forward" not in vars(net)  # nothing is left behind
