"""Saved models: bit-exact round trips, and an answer to every broken folder. Seed 0."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.saved import load_model, save_model
from tests.helpers.rounding import assert_same_but_for_rounding

CONFIGS = [
    MLPConfig(width=8, depth=1, dropout=0.25),
    UNetConfig(width=4, multipliers=(1, 2), blocks=1),
    DiTConfig(patch=3, width=8, depth=1, heads=2),
]


def denoiser(config: NetConfig = CONFIGS[0]) -> EDMDenoiser:
    torch.manual_seed(0)
    net = build_net(config, (2, 5, 4), 3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return EDMDenoiser(net, shape=(2, 5, 4), num_classes=3, sigma_data=0.4, sigma_min=0.01, sigma_max=70.0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "m", denoiser())
    return tmp_path / "m"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_bit_exact(config: NetConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model, extra = denoiser(config).to(dtype).eval(), {"classes": ["a", "b", "c"], "from": None}
    save_model(tmp_path / "run" / "model", model, extra)
    state = torch.get_rng_state()
    for folder in (tmp_path / "run" / "model", tmp_path / "run", str(tmp_path / "run")):
        again, kept = load_model(folder)
        assert kept == extra
        assert again.net.config == config
        assert not again.training
        for name in ("shape", "num_classes", "sigma_data", "sigma_min", "sigma_max"):
            assert getattr(again, name) == getattr(model, name)
        new = again.state_dict()
        for key, value in model.state_dict().items():
            assert new[key].dtype == dtype
            assert torch.equal(new[key], value)
        x, sigma, labels = torch.randn(3, 2, 5, 4), torch.tensor([0.01, 1.0, 70.0]), torch.tensor([-1, 0, 2])
        assert_same_but_for_rounding(again(x, sigma, labels), model(x, sigma, labels))
        assert all(p.requires_grad for p in again.parameters())
        torch.set_rng_state(state)
    load_model(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers


def test_saving_replaces_a_model_and_nothing_else(saved: Path) -> None:
    other = denoiser(CONFIGS[1])
    save_model(saved, other)
    assert load_model(saved)[0].net.config == CONFIGS[1]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m"]  # no temporary folder stays
    (saved / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a model folder"):
        save_model(saved, other)
    with pytest.raises(UserError, match="not a model folder"):
        save_model(saved / "thesis.txt", other)
    assert (saved / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_model(saved: Path) -> None:
    with pytest.raises(TypeError):
        save_model(saved, denoiser(CONFIGS[1]), {"not json": object()})
    assert load_model(saved)[0].net.config == CONFIGS[0]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m"]


def test_missing(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no model"):
        load_model(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_model(saved)


def test_pickles_are_refused_unopened(tmp_path: Path, saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("model.pt", "model.pkl", "net.pth", "old.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match="not opened"):
            load_model(tmp_path / name)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not opened"):
        load_model(saved)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match="give its folder"):
        load_model(saved / "config.json")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "does not describe a model"),
        ({"version": 99}, "another version"),
        ({"net": {"kind": "mlp", "width": 16, "depth": 1}}, "another architecture"),
        ({"net": {"kind": "transformer"}}, "unknown network"),
        ({"net": 5}, "damaged"),
        ({"net": {"kind": "mlp", "width": -1}}, "width"),
        ({"shape": [2, 5, 1, 1, 1]}, "vectors, sequences, images or video"),
        ({"shape": None}, "damaged"),
        ({"num_classes": "three"}, "number of classes"),
        ({"sigma_data": "big"}, "damaged"),
        ({"sigma_min": 100.0}, "sigma_min < sigma_max"),
    ],
)
def test_wrong_configs(saved: Path, changes: dict[str, object], words: str) -> None:
    edit(saved, **changes)
    with pytest.raises(UserError, match=words):
        load_model(saved)


def test_config_that_is_not_ours(saved: Path) -> None:
    for text in ("{", "[1, 2]", ""):
        (saved / "config.json").write_text(text)
        with pytest.raises(UserError):
            load_model(saved)
