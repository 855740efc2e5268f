"""What is said of memory against the tensors that are there."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import distmatch as dm
from distmatch.methods import context
from distmatch.nets import optim
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.sizes import role_sizes
from tests.helpers.small import batch, distiller, network_teacher


def unique(tensors: Any) -> int:
    """Bytes of the memory behind some tensors, each piece once."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(kept.values())


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("name", ["sida", "ctm", "scm"])
def test_sizes_are_those_of_the_tensors(name: str, train: str) -> None:
    teacher: Any = network_teacher(2)
    method = distiller(teacher, method=name, train=train, **({"gan_after": 0.0} if name == "ctm" else {}))
    state = method.init(0)
    networks: dict[str, nn.Module] = {"teacher": teacher, **state.modules()}
    said = role_sizes(networks, state.optimizers.values(), state.ema)
    grads: dict[int, int] = {}
    for module in networks.values():
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: grads.update({id(p): p.grad.nbytes}))
    for step in range(2):
        method.step(state, batch(step, 2))

    held = [t for m in networks.values() for t in (*m.parameters(), *m.buffers())]
    assert sum(s.weights for s in said.values()) == unique([*held, *state.ema.rest.values()])
    assert sum(s.parameters for s in said.values()) == sum(
        {p.data_ptr(): p.numel() for m in networks.values() for p in m.parameters()}.values()
    )
    assert sum(s.gradients for s in said.values()) == sum(grads.values())
    moments = [m for o in state.optimizers.values() for s in o.state.values() for m in s.values() if m.ndim]
    assert sum(s.optimizer for s in said.values()) == unique(moments)
    count = sum(p.numel() for p in teacher.parameters())
    assert said["teacher"].parameters == count
    if train == "lora":
        own = sum(p.numel() for p in state.student.denoiser.parameters() if p.requires_grad)
        assert said["student"].parameters == said["average"].parameters == own
    else:
        assert said["student"].parameters >= count


@pytest.mark.parametrize(("train", "copies"), [("lora", 1), ("full", 3)])
def test_with_adapters_no_second_buffer_is_as_large_as_the_base(
    train: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors alive when an optimizer steps, with gradients and what earlier steps left of moments.

    Full training has at that time the weights of teacher (twice, with the one handed in), student, average
    and fake score, rests of the average, gradients and moments: many more.
    """
    wide = 192
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(MLPConfig(width=wide, depth=1), (2,), 0)
    teacher = EDMDenoiser(net, shape=(2,), num_classes=0, sigma_data=0.7).eval()
    large = sum(p.nbytes for p in teacher.parameters() if p.numel() >= wide**2)
    found: list[float] = []
    step = optim.scheduled_step

    def counted(*args: Any) -> Any:
        gc.collect()
        alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.numel() >= wide**2]
        mine = {p.shape for p in teacher.parameters()}
        grads = [t.grad for t in alive if t.is_leaf and t.grad is not None]
        found.append(unique([t for t in (*alive, *grads) if t.shape in mine]) / large)
        return step(*args)

    monkeypatch.setattr(context, "scheduled_step", counted)
    built = dm.methods.build(teacher, "dmd2", total_steps=4, fake_score_steps=1, gan_weight=0.0, train=train)
    state = built.init(0)
    for index in range(3):
        built.step(state, batch(index, 0, 4))
    assert (max(found) == 1) if train == "lora" else (min(found) > copies)
