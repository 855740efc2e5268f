"""Adam's moments in the memory of the CPU between the steps of their network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.methods import construct, context
from distmatch.nets import training_state
from distmatch.nets.optim import moments_to
from distmatch.nets.shared import own_state
from distmatch.nets.sizes import RoleSize
from distmatch.training.memory import Memory
from tests.helpers.small import batch, distiller, network_teacher


def test_moments_are_on_the_device_for_the_step_of_their_network_alone(monkeypatch):
    found: list[Any] = []
    moves: list[Any] = []
    monkeypatch.setattr(construct, "_check_offload", lambda context: None)  # as on an accelerator

    def elsewhere(self: torch.Tensor, device: torch.device) -> torch.Tensor:
        """What takes the place of another device: other memory, with nothing left in that of before."""
        moved = self.clone()
        moves[-1][2].append(moved.nbytes)
        self.fill_(torch.nan)
        return moved

    def move(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        moves.append((optimizer, device, []))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", elsewhere)
            moments_to(optimizer, device)

    monkeypatch.setattr(context, "moments_to", move)
    for offload in (False, True):
        method = distiller(network_teacher(2), method="dmd2", offload=offload)
        state = method.init(0)
        for step in range(2):
            method.step(state, batch(step, 2))
        found.append(own_state(state.student.denoiser))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    names = {id(optimizer): name for name, optimizer in state.optimizers.items()}
    order = [names[id(optimizer)] for optimizer, _, _ in moves]
    assert order[::2] == order[1::2] == ["fake", "ratio", "student", "fake", "ratio"]
    # Two moments of each parameter, but for the first time, when there are none to fetch.
    for place, (optimizer, _, sizes) in enumerate(moves):
        weights = [p.nbytes for group in optimizer.param_groups for p in group["params"] for _ in range(2)]
        fetched = place % 2 == 0
        first = order.index(order[place]) == place
        assert sorted(sizes) == ([] if fetched and first else sorted(weights))


def test_a_resumed_run_has_the_moments_of_one_network_on_its_device_at_a_time(monkeypatch):
    order: list[Any] = []
    monkeypatch.setattr(construct, "_check_offload", lambda context: None)
    monkeypatch.setattr(training_state, "moments_to", lambda *moved: order.append(moved))
    state = distiller(network_teacher(2), method="dmd2", offload=True).init(0)
    for name, optimizer in state.optimizers.items():
        load = optimizer.load_state_dict
        monkeypatch.setattr(
            optimizer, "load_state_dict", lambda tree, n=name, f=load: (order.append(n), f(tree))
        )
    state.load_state_dict(state.state_dict())
    cpu = torch.device("cpu")
    assert order == [entry for n, o in state.optimizers.items() for entry in (n, (o, cpu))]


def test_moments_leave_their_device():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.sum().backward()
    optimizer.step()
    moments_to(optimizer, torch.device("meta"))
    places = {name: value.device.type for name, value in optimizer.state[weight].items()}
    assert places == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
    assert weight.device.type == "cpu"


def test_the_peak_has_the_moments_of_one_network():
    sizes = {"student": RoleSize(1, 10, 10, 20), "fake": RoleSize(1, 10, 12, 24)}
    memory = Memory(sizes, passes=15, parts={})
    assert memory.peak == 20 + 44 + 15
    assert replace(memory, offload=True).peak == 20 + 36
    assert replace(memory, offload=True, passes=50).peak == 20 + 50


def test_on_a_cpu_it_is_refused_before_training():
    with pytest.raises(UserError, match=r"--offload .*--device cpu"):
        distiller(network_teacher(), method="dmd2", offload=True)
