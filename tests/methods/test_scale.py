"""Data times c with the same seed give samples times c, for every method: nothing depends on the unit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.methods.student import Student
from distmatch.methods.table import METHODS
from distmatch.nets.edm import EDMDenoiser
from distmatch.ratio.discriminator import build_discriminator
from tests.helpers.small import distiller, network_teacher, read_by

STEPS, BATCH = 4, 24
QUICK = {"lr": 1e-2, "fit_steps": 3, "fake_score_steps": 1, "gan_weight": 0.1}
SPECIAL: dict[str, dict[str, Any]] = {
    "dmd": {"pairs": 32, "pair_steps": 4},
    "disback": {"backtrack": 2, "backtrack_degrade_steps": 1, "backtrack_interval": 1},
    "uni-instruct": {"ratio_warmup": 2},
    "scm": {"tangent_warmup": 0.05},
    "rcm": {"tangent_warmup": 0.05, "dmd_weight": 1.0},
    "ctm": {"gan_after": 0.0},
    "dpm-ot": {"bank": 16, "bank_steps": 4, "cell_draws": 4, "num_steps": 2},
}


def mixture(c: float) -> GaussianMixture:
    """Two classes of two modes each, of a standard deviation of about 0.9 times c."""
    means = torch.tensor([[-1.0, 0.2], [1.0, 0.5], [0.3, -1.1], [-0.6, 0.9]], dtype=torch.float64)
    spread = torch.tensor([0.1, 0.2, 0.05, 0.15], dtype=torch.float64)
    levels = {"sigma_min": 0.004 * c, "sigma_max": 60.0 * c}
    return GaussianMixture([0.3, 0.2, 0.4, 0.1], c * means, c**2 * spread, [0, 0, 1, 1], **levels)


def real(c: float, first: int, n: int) -> tuple[Tensor, Tensor]:
    """Real samples and their classes."""
    classes = torch.arange(n) % 2
    return c * mixture(1.0).sample(n, seed=first, conditioning=classes), classes


def run(
    c: float, teacher: Any, method: str, which: str | None, settings: dict[str, Any]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Samples of a student after a few steps on data times c, divided by c, and what was logged."""
    chosen = {**read_by(method, **QUICK), **SPECIAL.get(method, {}), **settings}
    made = distiller(teacher, which, method, total_steps=40, **chosen)
    state = made.init(0, lambda n: real(c, 1000, n))
    log = [made.step(state, Batch(*real(c, step, BATCH))) for step in range(STEPS)]
    return made.result(state, {}).sample(64, conditioning=torch.arange(64) % 2) / c, log


def compare(c: float, teachers: tuple[Any, Any], *choice: Any) -> None:
    """Runs the same choice on data times 1 and times c; samples and what is logged must agree.

    Equal up to rounding, 6e-8, which four steps let grow: Adam's first steps depend on the signs of gradients
    alone, and a ratio is the exponential of a logit. Measured are up to 8e-5 in samples of standard deviation
    0.9; where a single level or constant is in absolute units it is 0.03 or more.
    """
    (one, first), (other, second) = run(1.0, teachers[0], *choice), run(c, teachers[1], *choice)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-3)
    for a, b in zip(first, second, strict=True):
        for key in a.keys() & b.keys() & {"grad_norm_student", "grad_norm_fake", "loss", "loss_gan"}:
            # A loss in some unit of length would be c times as large: by more than these 2 % for any c here.
            torch.testing.assert_close(b[key], a[key], rtol=0.02, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_scaled_data_give_scaled_samples(method: str) -> None:
    compare(3.0, (mixture(1.0), mixture(3.0)), method, None, {})


VARIANTS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("f-distill", "kl", {"r1": 1.0}),
    ("f-distill", "hellinger", {"num_steps": 2, "guidance": 2.0, "noise_high": 20.0}),
    ("f-distill", "reverse_kl", {"scaling": "score", "student_sigma": 0.0}),
    ("dmd2", None, {"ratio_features": "fake", "noise_low": 0.3}),
    ("dmd", None, {"pair_loss": "huber", "guidance": 1.5}),
    ("sid", None, {"scaling": "score", "num_steps": 2}),
    ("sim", None, {"sim_distance": "absolute", "scaling": "score"}),
    ("sim", None, {"sim_distance": "squared", "guidance": 2.0}),
    ("uni-instruct", "js", {"ratio_gradient": "scores", "scaling": "score"}),
    ("moment-matching", None, {"num_steps": 3, "scaling": "dmd2"}),
    ("consistency", None, {"consistency_from": "data", "level_distribution": "log-normal", "huber": 0.3}),
    ("consistency", None, {"num_steps": 2, "teacher_solver": "euler", "solver_steps": 2, "guidance": 1.5}),
    ("scm", None, {"level_distribution": "log-normal", "num_steps": 2, "tangent": "difference"}),
    ("ctm", None, {"num_steps": 2, "gamma": 0.5, "huber": 0.1, "target_decay": 0.5}),
    ("mean-flow", None, {"num_steps": 2, "consistency_from": "data", "level_distribution": "karras"}),
    ("rcm", None, {"num_steps": 2, "level_distribution": "log-normal", "guidance": 1.5}),
    ("mmd", None, {"num_steps": 3, "mmd_spacing": "quadratic", "mmd_kernel": "rbf"}),
    ("mmd", None, {"num_steps": 2, "mmd_spacing": "uniform", "mmd_kernel": "cubic"}),
    ("imm", None, {"num_steps": 2, "gamma": 0.3, "imm_halvings": 4}),
    ("dpm-ot", None, {"blend": 0.5, "student_sigma": 3.0, "num_steps": 3}),
]


@pytest.mark.parametrize(("method", "which", "settings"), VARIANTS, ids=lambda v: str(v)[:60])
def test_scaled_data_give_scaled_samples_with_other_settings(
    method: str, which: str | None, settings: dict[str, Any]
) -> None:
    compare(1 / 16, (mixture(1.0), mixture(1 / 16)), method, which, settings)


@cache
def network(c: float) -> EDMDenoiser:
    """A random network on data times c: the same weights, told levels in units of the data."""
    teacher = network_teacher(2)
    teacher.sigma_data, teacher.noise_unit = 0.7 * c, 1.4 * c
    teacher.sigma_min, teacher.sigma_max = 0.004 * c, 60.0 * c
    return teacher


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("f-distill", {"ratio_features": "teacher"}),
        ("ctm", {"ratio_features": "teacher", "lr_discriminator": 0.03}),
        ("mmd", {"mmd_features": "teacher"}),
    ],
)
def test_scaled_data_give_scaled_samples_of_a_copied_network(method: str, settings: dict[str, Any]) -> None:
    compare(64.0, (network(1.0), network(64.0)), method, None, settings)


@pytest.mark.parametrize("source", ["own", "teacher"])
def test_a_discriminator_of_scaled_samples_says_the_same(source: Any) -> None:
    found = []
    for c in (1.0, 64.0):
        torch.manual_seed(0)
        head = build_discriminator(source, network(c), 2)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (x, labels), sigma = real(c, 0, 50), c * torch.linspace(0.01, 30, 50)
        features = network(c)(x, sigma, labels, return_features=True)[1] if source == "teacher" else x
        found.append(head(features, sigma, labels))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert found[0].std() > 0.1


def test_a_fresh_network_is_told_levels_in_units_of_the_data_and_saved_so(tmp_path: Path) -> None:
    made = distiller(mixture(3.0), "js")
    student = made.result(made.init(0, lambda n: real(3.0, 1000, n)), {})
    unit = 2 * mixture(3.0).sigma_data
    assert student.denoiser.noise_unit == pytest.approx(unit)
    student.save_pretrained(tmp_path / "model")
    again = Student.from_pretrained(tmp_path / "model")
    assert again.denoiser.noise_unit == student.denoiser.noise_unit
    labels = torch.arange(8) % 2
    torch.testing.assert_close(again.sample(8, conditioning=labels), student.sample(8, conditioning=labels))
    config = tmp_path / "model" / "config.json"
    assert json.loads(config.read_text())["version"] == 2  # which a release that knows no unit refuses
    config.write_text(config.read_text().replace(f'"noise_unit": {unit}', '"noise_unit": 0'))
    with pytest.raises(UserError, match="no model that can be built"):
        Student.from_pretrained(tmp_path / "model")
