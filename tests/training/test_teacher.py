"""Teachers on any path with any prediction: what they learn, what is saved, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.paths.specs import parse_path, path_from_dict, path_to_dict
from distmatch.diffusion.predictions import convert
from distmatch.losses import edm_weight
from distmatch.nets.config import MLPConfig
from distmatch.nets.path_denoiser import PathDenoiser, target_scale
from distmatch.nets.saved import load_model, save_model
from distmatch.training.objective import build_objective
from distmatch.training.options import TeacherConfig
from distmatch.training.packing import pack, unpack
from distmatch.training.teacher import TeacherState, TeacherTraining
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import batch as small_batch
from tests.helpers.small import distiller

GAUSSIAN = GaussianMixture([1.0], [[0.4, -0.3]], [[0.49, 0.09]])
SIGMA_DATA = 0.54
NET = MLPConfig(width=32, depth=2)
PAIRS = [
    ("edm", "f"),
    ("edm", "x0"),
    ("vp", "eps"),
    ("cosine", "v"),
    ("condot", "flow"),
    ("trigflow", "f"),
    ("ve", "score"),
    ("sub-vp", "v"),
]


def training(steps: int = 400, num_classes: int = 0, **settings: object) -> TeacherTraining:
    config = TeacherConfig(lr=3e-3, lr_rampup=20, ema_half_life=20.0, **settings)
    return TeacherTraining(config, NET, (2,), num_classes, SIGMA_DATA, steps, torch.device("cpu"))


def batch(step: int, n: int = 256, classes: int = 0) -> Batch:
    gen = torch.Generator().manual_seed(step)
    labels = torch.randint(classes, (n,), generator=gen) if classes else None
    return Batch(GAUSSIAN.sample(n, generator=gen), labels)


def run(method: TeacherTraining, steps: int, classes: int = 0) -> TeacherState:
    state = method.init(0)
    for step in range(steps):
        method.step(state, batch(step, classes=classes))
    return state


@torch.no_grad()
def excess(denoiser: torch.nn.Module, teacher: GaussianMixture = GAUSSIAN) -> float:
    """EDM-weighted square distance to the exact denoiser, from 0.05 to 10; about 0.5 before training."""
    gen = torch.Generator().manual_seed(9)
    sigma = torch.logspace(math.log10(0.05), 1, 2048)
    x = teacher.sample(2048, generator=gen) + sigma[:, None] * torch.randn(2048, 2, generator=gen)
    error = (denoiser(x, sigma) - teacher(x, sigma)).square().mean(1)
    return float((edm_weight(sigma, SIGMA_DATA) * error).mean())


@pytest.mark.parametrize(("path", "prediction"), PAIRS)
def test_every_parametrization_learns_the_exact_denoiser(path: str, prediction: str) -> None:
    # All start at 0.3 to 1 but x0, which is hard where D is nearly the input: it starts at 15, and 300 steps
    # take it to 0.12.
    method = training(300, path=path, prediction=prediction)
    before = excess(method.init(0).denoiser)
    after = excess(run(method, 300).ema.module)
    assert after < (0.5 if prediction == "x0" else 0.05)
    assert after < before / 8


@pytest.mark.statistical
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow", "score"])
@pytest.mark.parametrize("name", ["vp", "edm", "condot", "trigflow"])
def test_the_network_predicts_its_target_in_units_of_its_spread(name: str, prediction: str) -> None:
    path = noise_path(name)

    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.value

    net = Fixed()
    ends = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 50.0}
    denoiser = PathDenoiser(net, path, prediction, shape=(3,), num_classes=0, **ends)
    gen = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-1.5, 1, 40000, dtype=torch.float64)
    x0, eps = torch.randn(2, 40000, 3, generator=gen, dtype=torch.float64)
    x0 = 0.5 * x0
    c = path.coefficients(path.t_of_rho(sigma))
    noised = c.over(x0).alpha * (x0 + sigma[:, None] * eps)
    target = convert(x0, "x0", prediction, noised, c)
    value = target / target_scale(prediction, c, 0.5)[:, None]
    if denoiser.remainder:  # noise less the best linear guess, in units of its spread
        spread = 0.5 / (sigma**2 + 0.25).sqrt()
        guess = (sigma / (sigma**2 + 0.25))[:, None] * (x0 + sigma[:, None] * eps)
        value = (value - (-guess if prediction == "score" else guess)) / spread[:, None]
    net.value = value
    torch.testing.assert_close(denoiser(x0 + sigma[:, None] * eps, sigma), x0, rtol=0, atol=1e-11)
    for part in net.value.split(10000):  # of unit variance at every level: 4 standard errors of 30000 numbers
        assert abs(float(part.square().mean()) - 1) < 4 * math.sqrt(2 / 30000)


@pytest.mark.parametrize(
    ("path", "prediction"), [("vp", "eps"), ("vp", "score"), ("ve", "flow"), ("vp", "v"), ("condot", "flow")]
)
def test_no_error_of_a_network_is_multiplied_by_the_noise(path: str, prediction: str) -> None:
    """A network that is off by 1 in its own unit moves x0 by at most twice the data's spread, at any level.

    Where it predicted all of the noise, that was 80 at the start of a sampler: the rare start that it had
    hardly seen left the data for good.
    """
    net = torch.nn.Identity()
    ends = {"shape": (2,), "num_classes": 0, "sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 50.0}
    teacher = PathDenoiser(net, noise_path(path), prediction, **ends)
    level = torch.tensor([50.0, 5.0, 0.5, 0.02], dtype=torch.float64)[:, None]
    skip, out = teacher._scales(level, level**2 + 0.7**2)
    assert float(out.abs().max()) < 2 * 0.7
    assert float((skip * level).abs().max()) < 2 * 0.7
    older = PathDenoiser(net, noise_path(path), prediction, remainder=False, **ends)
    assert (float(older._scales(level, level**2 + 0.7**2)[1].abs().max()) > 40) == teacher.remainder


def test_models_of_before_keep_their_whole_targets(tmp_path: Path) -> None:
    method = training(path="vp", prediction="eps")
    denoiser = method.init(0).denoiser
    torch.nn.init.normal_(denoiser.net.last.weight)
    denoiser.remainder = False
    save_model(tmp_path / "m", denoiser)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config.pop("remainder") is False
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    x, sigma = torch.randn(4, 2), torch.tensor([0.1, 1.0, 10.0, 70.0])
    old, _ = load_model(tmp_path / "m")
    assert_same_but_for_rounding(old(x, sigma), denoiser(x, sigma))
    denoiser.remainder = True
    save_model(tmp_path / "n", denoiser)
    assert_same_but_for_rounding(load_model(tmp_path / "n")[0](x, sigma), denoiser(x, sigma))
    assert float((old(x, sigma) - denoiser(x, sigma)).detach().abs().max()) > 1


def test_a_resumed_run_is_the_whole_run() -> None:
    options = {"learned_uncertainty": True, "path": "condot", "condition_noise": 1.0, "weighting": "min-snr"}
    method = training(6, num_classes=3, **options)
    whole = run(method, 6, classes=3)
    half = run(method, 3, classes=3)
    tree = unpack(*pack(half.state_dict()))
    resumed = method.init(1)
    resumed.load_state_dict(tree)
    torch.rand(5)  # whatever else draws
    for step in range(3, 6):
        method.step(resumed, batch(step, classes=3))
    ours, theirs = pack(whole.state_dict())[0], pack(resumed.state_dict())[0]
    assert any("uncertainty" in name for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert float(tree["modules"]["uncertainty"]["last.weight"].abs().max()) > 0


def test_saved_models_keep_path_and_prediction(tmp_path) -> None:
    sigma = torch.logspace(-2, 1.5, 32)
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * (1 + sigma[:, None])
    for name, prediction in (*PAIRS, ("vp:beta_max=15", "flow")):
        method = training(path=name, prediction=prediction, pfgm_dims=64.0 if name == "condot" else 0.0)
        denoiser = run(method, 2).denoiser.eval()
        save_model(tmp_path / "model", denoiser)
        loaded, _ = load_model(tmp_path / "model")
        assert_same_but_for_rounding(loaded(x, sigma), denoiser(x, sigma))
        assert type(loaded) is type(denoiser)
        assert loaded.pfgm_dims == denoiser.pfgm_dims
        assert getattr(loaded, "path", None) == getattr(denoiser, "path", None)
    # A model of EDM is written as it always was.
    save_model(tmp_path / "model", run(training(), 1).denoiser)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert not {"path", "prediction", "pfgm_dims"} & config.keys()


def test_a_student_of_such_a_teacher_has_its_parametrization() -> None:
    teacher = run(training(path="condot"), 3).ema.module
    method = distiller(teacher, "js")
    state = method.init(0)
    assert isinstance(state.student.denoiser, PathDenoiser)
    assert state.student.denoiser.path == teacher.path
    for step in range(2):
        info = method.step(state, small_batch(step))
    assert all(bool(torch.isfinite(value).all()) for value in info.values())


def test_paths_as_text_and_json() -> None:
    ends = {"sigma_data": 0.6, "sigma_min": 0.01, "sigma_max": 70.0}
    assert parse_path("edm", **ends) == noise_path("edm", sigma_min=0.01, sigma_max=70.0)
    assert parse_path("vp:beta_max=12", **ends) == noise_path("vp", beta_max=12.0)
    assert parse_path("trigflow", **ends) == noise_path(
        "trigflow", sigma_data=0.6, rho_min=0.01, rho_max=70.0
    )
    for path in (noise_path("vp", beta_max=12.0), noise_path("trigflow", sigma_data=0.7)):
        assert path_from_dict(json.loads(json.dumps(path_to_dict(path)))) == path
    with pytest.raises(UserError, match="number"):
        parse_path("vp:beta_max=big", **ends)
    with pytest.raises(UserError, match="vp path does not take"):
        parse_path("vp:beta=1", **ends)
    with pytest.raises(UserError, match="noise path"):
        parse_path("vq", **ends)


def test_what_is_usual_on_a_path() -> None:
    usual = {
        "edm": ("f", "edm", "LogNormal"),
        "vp": ("eps", "target", "PathLevels"),
        "cosine": ("v", "target", "PathLevels"),
        "flow-matching": ("flow", "target", "PathLevels"),
        "trigflow": ("f", "edm", "PathLevels"),
    }
    for path, (prediction, weighting, levels) in usual.items():
        objective = build_objective(TeacherConfig(path=path), 0.5)
        found = (objective.prediction, objective.weighting, type(objective.levels).__name__)
        assert found == (prediction, weighting, levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "vp:beta_max=2"}, "does not reach its prior"),
        ({"path": "condot", "sigma_max": 3.0}, "does not reach its prior"),
        ({"path": "nowhere"}, "unknown noise path"),
        ({"condition_noise": 1.0}, "labels"),
        ({"condition_noise_kind": "gaussian"}, "goes with --condition-noise"),
        ({"label_dropout": 0.3}, "label-dropout drops labels and captions, and there are none"),
        ({"ambient_noise": 0.1, "pfgm_dims": 10.0}, "ambient-noise"),
        ({"ambient_clean": 1.5}, "ambient-clean"),
        ({"logit_std": 0.0}, "logit-std"),
        ({"pfgm_dims": -1.0}, "pfgm-dims"),
        ({"noise_mean": 0.0, "path": "vp"}, "noise-mean does nothing"),
        ({"logit_std": 2.0}, "logit-std does nothing"),
        ({"min_snr_gamma": 2.0}, "goes with --weighting min-snr"),
        ({"ambient_given": True}, "goes with --ambient-noise"),
        ({"ambient_clean": 0.5}, "ambient-clean does nothing"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training(**options)


def test_levels_that_end_too_early_are_told() -> None:
    assert training().warnings == training(sigma_max=10 * SIGMA_DATA).warnings == []
    (said,) = training(sigma_max=5.3).warnings
    assert "edm path does not reach its prior" in said
    assert "5.3 for data of standard deviation 0.54" in said
    assert "at least 5.4" in said
    assert training(label_dropout=0.0).warnings == []  # without labels, hiding none is no mistake
    training(label_dropout=0.3, num_classes=2)


def test_options_have_defaults_that_old_configs_mean() -> None:
    config = TeacherConfig()
    assert config.path == "edm"
    assert config.pfgm_dims == config.ambient_noise == config.instance_noise == config.condition_noise == 0
    assert dataclasses.replace(config, weighting="edm") != config
