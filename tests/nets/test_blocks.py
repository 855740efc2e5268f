"""Blocks found by structure, and activations that are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.nets.blocks import recompute_blocks, repeated_blocks
from distmatch.nets.shared import own_state, role_copy
from tests.helpers.image_teachers import image_teacher, images
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import distiller, network_teacher


class Levels(nn.Module):
    """A network whose levels are of different classes, as those of U-Nets are."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential
        plain, attending = nn.Module(), nn.Sequential()
        plain.resnets = nn.ModuleList(block(nn.Linear(2, 2)) for _ in range(2))
        attending.resnets = nn.ModuleList([block(nn.Linear(2, 2))])
        attending.convs = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.levels = nn.ModuleList([plain, attending])
        self.encoder = nn.ModuleDict({"in": nn.Linear(2, 2), "a": block(nn.Linear(2, 2))})
        self.last = nn.Sequential(nn.Linear(2, 2))


def test_blocks_are_found_by_structure():
    assert list(repeated_blocks(Levels())) == [
        "levels.0.resnets.0",
        "levels.0.resnets.1",
        "levels.1.resnets.0",
        "encoder.a",
    ]
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=32)
        flux = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=3)
    names = list(repeated_blocks(unet))
    assert names[:4] == [f"down_blocks.0.{part}.{i}" for part in ("attentions", "resnets") for i in (0, 1)]
    assert len(names) == 16 + 22 + 6  # transformers, residual blocks and resampling of Stable Diffusion 1.5
    assert list(repeated_blocks(flux)) == [
        *(f"transformer_blocks.{i}" for i in range(2)),
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    ]


def kept_bytes(network: Any, x: torch.Tensor, sigma: torch.Tensor) -> int:
    """Bytes that a pass keeps for its backward pass, without the weights; each piece of memory once."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x, sigma)
    return sum(kept.values())


def test_a_pass_keeps_the_inputs_of_blocks_alone_and_has_the_same_gradient():
    plain = image_teacher("dit").requires_grad_(True)
    again = role_copy(plain)
    recompute_blocks(again.net)
    other = role_copy(again)
    x, sigma = torch.randn(4, *plain.shape), torch.linspace(0.2, 3, 4)
    assert kept_bytes(other, x, sigma) < 0.5 * kept_bytes(plain, x, sigma)
    for network in (plain, again, other):
        network(x, sigma).square().sum().backward()
    for p, q, r in zip(plain.parameters(), again.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            assert_same_but_for_rounding(q.grad, p.grad)
            assert_same_but_for_rounding(r.grad, p.grad)
            assert q.grad.data_ptr() != r.grad.data_ptr()
    with torch.no_grad():
        assert torch.equal(plain(x, sigma), again(x, sigma))
    with pytest.raises(UserError, match="this network has none"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2)))


CASES = [
    ("f-distill", "dit", {}),
    ("f-distill", "unet", {"train": "lora", "accumulate": 2}),
    ("dmd2", "diffusers", {"ratio_features": "fake"}),
    ("dmd2", "diffusers", {"ratio_features": "teacher", "train": "lora", "base_dtype": "bfloat16"}),
    ("sid", "dit", {}),
    ("scm", "dit", {"train": "lora"}),
    ("ctm", "mlp", {"gan_after": 0.0}),
    ("mmd", "mlp", {"mmd_features": "teacher", "mmd_checkpoint": True, "num_steps": 2}),
]


@pytest.mark.parametrize(("name", "net", "options"), CASES)
def test_a_training_is_the_same(name, net, options):
    """Also with features by hooks, adapters, derivatives in forward mode and through the teacher's input."""
    found = []
    for again in (False, True):
        teacher = network_teacher(2) if net == "mlp" else image_teacher(net)
        method = distiller(teacher, method=name, checkpointing=again, **options)
        state = method.init(0)
        infos = [method.step(state, images(step, teacher)) for step in range(2)]
        found.append((infos, own_state(state.student.denoiser)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5, equal_nan=True)
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, rtol=1e-3, atol=1e-4)


class Flat(nn.Module):
    """A network without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + t[:, None]


def test_a_network_without_blocks_is_refused_before_training():
    teacher = dm.as_denoiser(Flat(), "vp", "eps", shape=(2,))
    with pytest.raises(UserError, match="--checkpointing"):
        distiller(teacher, method="diff-instruct", checkpointing=True)
