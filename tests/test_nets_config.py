"""Configs of networks: round trips, defaults, and an explanation for every mistake."""

import subprocess
import sys

import pytest

from distmatch.base.errors import UserError
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig, default_config, from_dict, to_dict


def test_configs_round_trip_and_defaults() -> None:
    for config in (MLPConfig(), MLPConfig(dropout=0.1), UNetConfig(attention=(0, -1)), DiTConfig(heads=2)):
        assert from_dict(to_dict(config)) == config
    assert to_dict(UNetConfig())["multipliers"] == [1, 2, 2]
    assert default_config("auto", (2,)) == MLPConfig()
    assert default_config("auto", (1, 8, 8)) == MLPConfig()
    assert default_config("auto", (3, 8, 8)) == UNetConfig(multipliers=(1, 2))
    assert default_config("auto", (1, 28, 28)) == UNetConfig()
    assert default_config("unet", (3, 64, 64)) == UNetConfig(multipliers=(1, 2, 2, 2))
    assert default_config("dit", (3, 32, 32)) == DiTConfig()
    assert UNetConfig(multipliers=(1, 2, 3), attention=(0, -1)).attention_levels == {0, 2}


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
        (lambda: default_config("cnn", (2,)), "auto, mlp, unet, dit"),
        (lambda: default_config("auto", (8, 8)), "(1, height, width)"),
        (lambda: build_net(UNetConfig(), (5,), 0), "mlp network for vectors"),
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
