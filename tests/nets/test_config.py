"""Configs of networks: round trips, defaults, and an explanation for every mistake."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distmatch.base.errors import UserError
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig, default_config, from_dict, to_dict
from distmatch.nets.work import network_work


def test_configs_round_trip_and_defaults() -> None:
    for config in (MLPConfig(), MLPConfig(dropout=0.1), UNetConfig(attention=(0, -1)), DiTConfig(heads=2)):
        assert from_dict(to_dict(config)) == config
    assert to_dict(UNetConfig())["multipliers"] == [1, 2, 2]
    for device in ("cpu", "cuda", "mps"):
        assert default_config("auto", (2,), device) == MLPConfig()
        assert default_config("auto", (1, 8, 8), device) == MLPConfig()
        assert default_config("unet", (3, 64, 64), device) == UNetConfig(multipliers=(1, 2, 2, 2))
        assert default_config("dit", (3, 32, 32), device) == DiTConfig()
        assert default_config("dit", (6, 2), device) == DiTConfig(patch=1)
    assert default_config("auto", (1, 8, 8, 8), "cuda") == DiTConfig()
    assert default_config("auto", (1, 8, 8, 8), "cpu") == DiTConfig(width=96, depth=4)
    # A power of 2 that leaves at most 1024 tokens: 1025 in pairs, 16 x 64 x 64 by fours.
    assert default_config("dit-small", (1025, 2), "cuda") == DiTConfig(width=96, depth=4, patch=2)
    assert default_config("dit", (3, 16, 64, 64), "cuda") == DiTConfig(patch=4)
    assert default_config("auto", (3, 8, 8), "cuda") == UNetConfig(multipliers=(1, 2))
    assert default_config("auto", (1, 28, 28), "mps") == UNetConfig()
    assert default_config("auto", (1, 28, 28), "cpu") == UNetConfig(width=24, blocks=1)
    assert UNetConfig(multipliers=(1, 2, 3), attention=(0, -1)).attention_levels == {0, 2}


@pytest.mark.parametrize(
    ("side", "channels"),
    [
        (9, (24, 48)),
        (28, (24, 48, 48)),
        (32, (24, 48, 48)),
        (64, (12, 24, 48, 48)),
        (128, (6, 12, 24, 48, 48)),
        (256, (6, 12, 24, 48, 48, 48)),
    ],
)
def test_the_small_unet_is_the_same_from_32_pixels_down(side: int, channels: tuple[int, ...]) -> None:
    config = default_config("auto", (3, side, side), "cpu")
    assert isinstance(config, UNetConfig)
    assert tuple(config.width * m for m in config.multipliers) == channels
    assert config == default_config("unet-small", (3, side, side), "cuda")
    large = default_config("unet", (3, side, side), "cpu")
    small, big = (network_work(c, (3, side, side), 0)[1] for c in (config, large))
    assert small < big / 9


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 24)])
def test_work_is_what_torch_counts(shape: tuple[int, ...]) -> None:
    """But for attention, whose products are left out; torch counts a multiply-add as two."""
    config = UNetConfig(width=24, blocks=1)
    state = torch.random.get_rng_state()
    parameters, work = network_work(config, shape, 10)
    assert torch.equal(torch.random.get_rng_state(), state)
    net = build_net(config, shape, 10)
    assert parameters == sum(p.numel() for p in net.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    found = counter.get_flop_counts()["Global"]
    dense = sum(n for kind, n in found.items() if str(kind) in ("aten.convolution", "aten.addmm", "aten.mm"))
    assert 2 * work == pytest.approx(dense, rel=1e-9)
    assert 2 * work > 0.9 * counter.get_total_flops()


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: MLPConfig(width=0), "width"),
        (lambda: MLPConfig(depth=True), "depth"),
        (lambda: MLPConfig(width="8"), "width"),
        (lambda: MLPConfig(dropout=1.0), "dropout"),
        (lambda: UNetConfig(width=2), "width"),
        (lambda: UNetConfig(multipliers=()), "multipliers"),
        (lambda: UNetConfig(multipliers=(1, 0)), "multipliers"),
        (lambda: UNetConfig(attention=(3,)), "attention"),
        (lambda: DiTConfig(width=192, heads=5), "fix: set width to 200"),
        (lambda: from_dict({"kind": "umet"}), "unet"),
        (lambda: from_dict({}), "mlp, unet, dit"),
        (lambda: from_dict({"kind": "mlp", "widht": 3}), "did you mean width"),
        (lambda: default_config("cnn", (2,), "cpu"), "auto, mlp, unet, dit, unet-small, dit-small"),
        (lambda: default_config("auto", (8, 0), "cpu"), "(length, channels)"),
        (lambda: default_config("auto", (1, 2, 3, 4, 5), "cpu"), "(channels, frames, height, width)"),
        (lambda: build_net(UNetConfig(), (5,), 0), "mlp network for vectors"),
        (lambda: build_net(UNetConfig(), (1, 4, 8, 8), 0), "dit network for sequences and video"),
        (lambda: build_net(DiTConfig(), (5,), 0), "mlp network for vectors"),
        (lambda: build_net(MLPConfig(), (5,), -1), "number of classes"),
    ],
)
def test_mistakes_are_explained(make_it, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        make_it()
    assert words in str(caught.value).replace("Fix:", "fix:")


def test_config_needs_no_torch() -> None:
    code = "import sys, distmatch.nets.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
