"""Networks of two noise levels start as their teacher, are saved with both, and refuse what cannot be."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import jump
from distmatch.diffusion.paths import condot
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, NetConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.jump import as_jump
from distmatch.nets.path_denoiser import PathDenoiser
from distmatch.nets.saved import load_model, save_model
from tests.helpers.rounding import assert_same_but_for_rounding

NETS: list[NetConfig] = [
    MLPConfig(width=8, depth=2),
    UNetConfig(width=4, multipliers=(1, 2), blocks=1),
    DiTConfig(patch=2, width=8, depth=2, heads=2),
]
ENDS = {"shape": (1, 4, 4), "num_classes": 3, "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def denoiser(config: NetConfig) -> EDMDenoiser:
    torch.manual_seed(0)
    return EDMDenoiser(randomized(build_net(config, (1, 4, 4), 3)), **ENDS).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 4, 4, generator=g), torch.tensor([0.01, 1.0, 80.0]), torch.tensor([0, -1, 2])


@pytest.mark.parametrize("config", NETS)
def test_a_copy_starts_as_its_teacher_wherever_it_jumps_to(config: NetConfig) -> None:
    teacher = denoiser(config)
    student = as_jump(teacher)
    x, sigma, labels = inputs()
    for share in (0.0, 0.3, 1.0):
        assert_same_but_for_rounding(
            student(x, sigma, labels, target_sigma=share * sigma), teacher(x, sigma, labels)
        )
    assert_same_but_for_rounding(
        student(x, sigma, labels, return_features=True)[0], teacher(x, sigma, labels)
    )
    assert not teacher.jumps


@pytest.mark.parametrize("config", NETS)
def test_where_it_jumps_to_matters_once_trained_and_none_is_the_data(config: NetConfig) -> None:
    student = as_jump(denoiser(config))
    randomized(student)
    x, sigma, labels = inputs()
    to_data = student(x, sigma, labels, target_sigma=torch.zeros(3))
    assert torch.equal(student(x, sigma, labels), to_data)
    assert ((student(x, sigma, labels, target_sigma=sigma / 2) - to_data).flatten(1).norm(dim=1) > 1e-4).all()
    assert torch.equal(jump(student, x, sigma, sigma, labels), x)  # the identity, to the bit
    assert torch.equal(jump(student, x, sigma, torch.zeros(3), labels), to_data)


def test_a_jump_of_a_denoiser_is_a_step_of_euler() -> None:
    """With D alone it is DDIM: x + (to - sigma) (x - D) / sigma."""
    student = as_jump(denoiser(NETS[0])).double()
    x, sigma, labels = inputs()
    x, sigma, to = x.double(), sigma.double(), sigma.double() / 3
    slope = (x - student(x, sigma, labels)) / sigma[:, None, None, None]
    wanted = x + (to - sigma)[:, None, None, None] * slope
    # Exact up to rounding: float64, numbers of order 1.
    assert torch.allclose(jump(student, x, sigma, to, labels), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("config", NETS)
def test_saved_and_loaded_with_both_levels(config: NetConfig, tmp_path: Path) -> None:
    student = as_jump(denoiser(config))
    randomized(student)
    save_model(tmp_path / "m", student)
    again, _ = load_model(tmp_path / "m")
    x, sigma, labels = inputs()
    assert again.jumps
    assert_same_but_for_rounding(
        again(x, sigma, labels, target_sigma=sigma / 2), student(x, sigma, labels, target_sigma=sigma / 2)
    )


def test_denoisers_on_other_paths_jump_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomized(build_net(NETS[0], (1, 4, 4), 3))
    teacher = PathDenoiser(net, condot(), "flow", **ENDS).eval()
    x, sigma, labels = inputs()
    student = as_jump(teacher)
    assert isinstance(student, PathDenoiser)
    assert_same_but_for_rounding(student(x, sigma, labels, target_sigma=sigma / 2), teacher(x, sigma, labels))
    save_model(tmp_path / "m", student)
    assert load_model(tmp_path / "m")[0].jumps


def test_one_level_is_refused_a_second() -> None:
    x, sigma, labels = inputs()
    with pytest.raises(UserError, match="one noise level"):
        denoiser(NETS[0])(x, sigma, labels, target_sigma=sigma)
    foreign = EDMDenoiser(nn.Conv2d(1, 1, 1), **ENDS)
    with pytest.raises(UserError, match="no input for a second noise level"):
        as_jump(foreign)
