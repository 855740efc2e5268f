"""What a step costs: passes of networks, whole periods, memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD

from distmatch.training.comparison import cost as compare_cost
from distmatch.training.comparison.cost import Passes, PeakMemory, count_passes, measure_cost, step_times
from distmatch.training.options import DistillOptions, NetOptions, RunOptions
from distmatch.training.prepare import prepare_distillation
from tests.helpers.small import network_teacher


def test_passes_of_a_network_however_it_is_entered() -> None:
    """Three batches of 8 forward, one of 5 with features, one of 100 for features alone; two come back.

    The second comes back to the input only, and so past the layers that see the level alone. A pass counts
    for the share of the parameters that it meets.
    """
    net = network_teacher().requires_grad_(True)
    every = {name: p.numel() for name, p in net.named_parameters()}
    of_level = sum(n for name, n in every.items() if "conditioning" in name or "modulation" in name)
    behind = sum(n for name, n in every.items() if name.startswith(("net.norm", "net.last")))
    assert "net.trunk.blocks.0.modulation.weight" in every
    assert behind > 0
    x, sigma = torch.randn(8, 2), torch.full((8,), 1.5)
    passes = Passes()
    with count_passes({"net": net, "same": net}, passes):
        net(x, sigma).sum().backward()
        with torch.no_grad():
            net(x, sigma)
            net(x[:5], sigma[:5], return_features=True)
            net(x[:1].expand(100, -1), sigma[:1].expand(100), return_features="only")
        net.requires_grad_(False)
        net(x.clone().requires_grad_(), sigma).sum().backward()
    total = sum(every.values())
    forward = round(29 + 100 * (total - behind) / total)
    assert passes.forward == {"net": forward, "same": 0}
    assert passes.backward == {"net": round(8 + 8 * (total - of_level) / total), "same": 0}
    net(x, sigma)
    assert passes.forward["net"] == forward  # the hooks are gone


def test_forward_mode_derivatives_are_one_pass() -> None:
    net = network_teacher()
    passes = Passes()
    x, sigma = torch.randn(4, 2), torch.ones(4)
    with count_passes({"net": net}, passes), fwAD.dual_level():
        net(fwAD.make_dual(x, torch.ones_like(x)), sigma)
    assert passes.forward["net"] == 4


def test_the_passes_of_diff_instruct_are_those_of_its_algorithm() -> None:
    """Each step a batch of the student and a step of the fake score on it; each fifth the student's own."""
    options = DistillOptions.of("diff-instruct", run=RunOptions(batch=16, steps=1000))
    job = prepare_distillation(options, network_teacher(), fresh=False)
    cost = measure_cost(job, batch=16)
    assert cost.forward == pytest.approx({"teacher": 0.2, "student": 1.0, "average": 0.0, "fake": 1.2})
    assert cost.backward == pytest.approx({"teacher": 0.0, "student": 0.2, "average": 0.0, "fake": 1.0})
    assert cost.step.calls == pytest.approx(3.6)
    assert cost.step.seconds > 0
    twice = prepare_distillation(options, network_teacher(), fresh=False)
    assert measure_cost(twice, batch=8).step.calls == pytest.approx(7.2)  # a batch of 16 is two of 8


def test_a_small_discriminator_counts_by_its_share_and_an_exact_teacher_not_at_all() -> None:
    net = NetOptions(net="mlp", width=512, depth=1)  # larger than the discriminator
    options = DistillOptions.of("dmd2", teacher="ring8", net=net, run=RunOptions(batch=16, steps=1000))
    cost = measure_cost(prepare_distillation(options, fresh=False), batch=16)
    assert cost.forward["teacher"] == 0
    others = sum(cost.forward[k] + cost.backward[k] for k in ("student", "fake"))
    ratio = cost.forward["ratio"] + cost.backward["ratio"]
    share = cost.parameters["ratio"] / cost.parameters["student"]
    assert ratio > 0
    assert share < 0.5
    assert cost.step.calls == pytest.approx(others + share * ratio)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only where a test says so: nothing else is on this machine, and nobody waits."""
    found = SimpleNamespace(now=0.0)
    found.perf_counter = lambda: found.now
    monkeypatch.setattr(compare_cost, "time", found)
    return found


def test_what_is_made_once_is_no_part_of_a_step(clock: SimpleNamespace) -> None:
    options = DistillOptions.of("diff-instruct", run=RunOptions(batch=16, steps=1000))
    job = prepare_distillation(options, network_teacher(), fresh=False)
    step = job.step

    def slow_at_first(state: Any, batch: Any) -> Any:
        if state.step == 0:
            job.networks["teacher"](torch.zeros(1600, 2), torch.ones(1600))
            clock.now += 3
        clock.now += 0.01
        return step(state, batch)

    job.step = slow_at_first
    cost = measure_cost(job, batch=16)
    assert cost.once.seconds == pytest.approx(3)
    assert cost.step.seconds == pytest.approx(0.01)
    assert cost.once.calls == pytest.approx(100, abs=5)
    assert cost.step.calls == pytest.approx(3.6)
    assert cost.seconds(10) == pytest.approx(cost.once.seconds + 10 * cost.step.seconds)
    plain = measure_cost(prepare_distillation(options, network_teacher(), fresh=False), batch=16)
    assert plain.once.calls == 0


def test_a_dry_run_times_whole_periods_and_what_is_made_once(clock: SimpleNamespace) -> None:
    settings = replace(DistillOptions.of("diff-instruct").settings, fake_score_steps=8)
    options = DistillOptions.of("diff-instruct", run=RunOptions(batch=16, steps=400), settings=settings)
    job = prepare_distillation(options, network_teacher(), fresh=False)
    step, seen = job.step, []

    def slow_when_the_student_moves(state: Any, batch: Any) -> Any:
        seen.append(state.step)
        clock.now += 4 if state.step == 0 else 0.16 if (state.step + 1) % 8 == 0 else 0.01
        return step(state, batch)

    job.step = slow_when_the_student_moves
    once, seconds = step_times(job, torch.device("cpu"))
    assert seen == [0, *range(200, 208)]
    assert seconds == pytest.approx((0.16 + 7 * 0.01) / 8)
    assert once == pytest.approx(4 - seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the peak of a process back")
def test_peak_memory_is_that_of_the_part_that_was_asked_for() -> None:
    earlier = np.ones(2**24)  # 128 MiB, gone before the part begins
    del earlier
    memory = PeakMemory(torch.device("cpu"))
    part = np.ones(2**23)  # 64 MiB
    del part
    taken = memory.bytes()
    assert taken is not None
    assert 60 * 2**20 < taken < 80 * 2**20
    assert (PeakMemory(torch.device("cpu")).bytes() or 0) < 10 * 2**20
