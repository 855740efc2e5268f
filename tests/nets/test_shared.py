"""Roles of one network: which buffers they have in common, and which are their own."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import distmatch as dm
from distmatch.base.files import read_json
from distmatch.data.batches import Batch
from distmatch.interop import lora
from distmatch.interop.adapter_files import adapters_on, save_adapters
from distmatch.nets import shared
from distmatch.nets.ema import EMA
from distmatch.nets.shared import constant_buffers, own_state, role_copy
from distmatch.nets.sizes import role_sizes
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import distiller

POSITIONS = 8 * 8 * 16  # float32 numbers


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


def teacher_of() -> Any:
    """A teacher with a table of positions, as the state of SD3 has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = sd3()

    def call(module: Any, x: Any, t: Any, conditions: Any) -> Any:
        text = x.new_zeros(len(x), 3, 8)
        pooled = x.new_zeros(len(x), 8)
        return module(x, text, pooled, t, return_dict=False)[0]

    return dm.as_denoiser(net, "condot", "flow", shape=(4, 8, 8), call=call).eval()


def trained(steps: int = 2) -> tuple[Any, Any]:
    method = distiller(teacher_of(), method="diff-instruct", train="lora", lora_rank=2)
    state = method.init(0)
    for _ in range(steps):
        method.step(state, Batch(torch.zeros(2, 4, 8, 8), None))
    return method, state


@pytest.fixture
def as_before(monkeypatch):
    """Every role copies its buffers, as earlier versions did, until this is called."""
    with monkeypatch.context() as patch:
        for module in (shared, lora):
            patch.setattr(module, "constant_buffers", lambda network: [])
        yield patch.undo


def test_a_table_of_positions_is_in_memory_once():
    method, state = trained()
    sizes = role_sizes({"teacher": method.teacher, **state.modules()}, state.optimizers.values(), state.ema)
    assert sizes["teacher"].weights == 4 * (sizes["teacher"].parameters + POSITIONS)
    for role in ("student", "fake"):
        assert sizes[role].weights == 4 * sizes[role].parameters
    assert sizes["average"].weights == 8 * sizes["average"].parameters  # and its rest
    for module in state.modules().values():
        assert not any("pos_embed.pos_embed" in name for name in own_state(module))


def test_a_given_base_is_not_copied():
    teacher = teacher_of()
    method = distiller(teacher, method="diff-instruct", train="lora", lora_rank=2)
    given, mine = (list(network.buffers()) for network in (teacher, method.teacher))
    assert given
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in mine]


def test_training_is_the_same_and_earlier_checkpoints_and_adapters_are_read(as_before, tmp_path):
    _, state = trained()
    assert any("pos_embed.pos_embed" in name for name in own_state(state.student.denoiser))
    saved = copy.deepcopy(state.state_dict())
    save_adapters(tmp_path / "adapters", state.student.denoiser, {}, None)
    as_before()
    other, now = trained()
    for name, module in now.modules().items():
        before = own_state(state.modules()[name])
        for key, value in own_state(module).items():
            assert_same_but_for_rounding(value, before[key])

    # Buffers of the base are left alone, whatever a checkpoint has in their place.
    for tensors in saved["modules"].values():
        tensors.update({k: v + 1 for k, v in tensors.items() if "pos_embed.pos_embed" in k})
    table = constant_buffers(other.teacher)[0].clone()
    now.load_state_dict(saved)
    assert torch.equal(constant_buffers(other.teacher)[0], table)
    for name, module in now.modules().items():
        before = own_state(state.modules()[name])
        assert all(torch.equal(value, before[key]) for key, value in own_state(module).items())
    folder = tmp_path / "adapters"
    again = adapters_on(folder, read_json(folder / "config.json"), teacher_of())
    expected = own_state(now.student.denoiser)
    assert all(torch.equal(value, expected[key]) for key, value in own_state(again).items())


def test_what_a_pass_changes_is_its_own():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.norm(x)

    first = Scaled()
    other, average = role_copy(first), EMA(first)
    first(torch.randn(4, 3) + 5)
    assert (float(first.calls), float(other.calls), float(average.module.calls)) == (1, 0, 0)
    assert float(first.norm.running_mean.min()) > 0
    assert torch.equal(other.norm.running_mean, torch.zeros(3))
    average.update(first, 0.5)
    assert torch.equal(average.module.norm.running_mean, first.norm.running_mean)
    assert average.module.calls is not first.calls


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    )


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )


ONE = torch.ones(1)
CALLS: dict[str, tuple[Any, Any]] = {
    "sd3": (sd3, lambda net, x: net(x, torch.zeros(1, 3, 8), torch.zeros(1, 8), ONE)),
    "wan": (wan, lambda net, x: net(x[:, :, None], ONE, torch.zeros(1, 3, 8))),
    "pixart": (pixart, lambda net, x: net(x, torch.zeros(1, 3, 8), ONE, {})),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_pass_of_diffusers_writes_into_a_shared_buffer(name):
    make, call = CALLS[name]
    net = make().train()
    buffers = constant_buffers(net)
    assert buffers
    versions = [buffer._version for buffer in buffers]
    call(net, torch.randn(1, 4, 8, 8))[0].sum().backward()
    assert [buffer._version for buffer in buffers] == versions
    assert {id(b) for b in constant_buffers(net)} == {id(b) for b in buffers}
