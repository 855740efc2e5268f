"""Adam's moments in the memory of the CPU between the steps of their network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.methods import construct, context
from distmatch.nets.optim import moments_to
from distmatch.nets.shared import own_state
from distmatch.nets.sizes import RoleSize
from distmatch.training.memory import Memory
from tests.helpers.small import batch, distiller, network_teacher


def test_moments_are_on_the_device_for_the_step_of_their_network_alone(monkeypatch):
    found: list[Any] = []
    moves: list[Any] = []
    monkeypatch.setattr(construct, "_check_offload", lambda context: None)  # as on an accelerator
    monkeypatch.setattr(context, "moments_to", lambda optimizer, device: moves.append((optimizer, device)))
    for offload in (False, True):
        method = distiller(network_teacher(2), method="dmd2", offload=offload)
        state = method.init(0)
        for step in range(2):
            method.step(state, batch(step, 2))
        found.append(own_state(state.student.denoiser))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    names = {id(optimizer): name for name, optimizer in state.optimizers.items()}
    order = [names[id(optimizer)] for optimizer, _ in moves]
    assert order[::2] == order[1::2] == ["fake", "ratio", "student", "fake", "ratio"]


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
