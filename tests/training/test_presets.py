"""Published settings by name: units, precedence, what is refused, and who is warned of the defaults."""

from __future__ import annotations

import importlib.util
import math
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.methods.table import METHODS, find_method
from distmatch.training import presets
from distmatch.training.comparison.options import SharedOptions, entry_options, parse_methods
from distmatch.training.options import DistillOptions, RunOptions
from distmatch.training.prepare import prepare_distillation
from distmatch.training.presets import LAPTOP, PRESETS, find_preset, of_method
from distmatch.training.published import units
from tests.helpers.command import TINY, command, done
from tests.helpers.presets import own_teacher, points, warned

DOCS = Path(__file__).parents[2] / "docs"
SID = "paper:sid-cifar10"
SHORT = "--teacher ring8 --batch 8 --fit-steps 2"


# ------------------------------------------------------------------------- the data


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_of_its_method_and_moves_a_student(name: str) -> None:
    """Only options that the method reads; and nothing that its other settings leave without effect."""
    preset = PRESETS[name]
    method = find_method(preset.method)
    assert name.startswith(f"paper:{method.name}-")
    options = DistillOptions.of(None, name)
    for setting, (value, published, place) in preset.settings.items():
        held = [options.settings, options.run, options]
        assert value == next(getattr(group, setting) for group in held if hasattr(group, setting))
        assert published
        assert place
    assert preset.differs
    assert "arXiv" in preset.source or "publish none" in preset.source
    (warning,) = warned(options, own_teacher(), points())  # published for other networks
    assert f"--preset {name} is in force" in warning
    period = getattr(options.settings, "fake_score_steps", 1)
    if method.has_fake_score:
        options = replace(options, settings=replace(options.settings, warmup_steps=0))  # type: ignore[call-arg]
    options = replace(options, run=replace(options.run, batch=16))
    job = prepare_distillation(options, own_teacher(), points())
    before = [p.clone() for p in job.state.student.denoiser.parameters()]
    for step in range(2 * period):  # at first fake score and teacher are one
        job.step(job.state, job.batches(step))
    pairs = zip(before, job.state.student.denoiser.parameters(), strict=True)
    # DisBack's student waits until its copies are recorded.
    assert preset.method == "disback" or any(not torch.equal(a, b) for a, b in pairs)


def test_the_page_shows_the_tables_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("make_presets_table", DOCS / "make_presets_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (DOCS / "presets.md").read_text()
    assert script.page(text) == text, "run docs/make_presets_table.py"


def test_laptop_is_what_the_options_are() -> None:
    assert DistillOptions.of(None) == DistillOptions(divergence="js")
    assert DistillOptions.of(None) == DistillOptions.of("f-distill", LAPTOP)
    assert DistillOptions().preset == LAPTOP
    for name in METHODS:
        assert DistillOptions.of(name, LAPTOP) == DistillOptions.of(name)


def test_every_method_with_a_network_has_a_preset_to_name() -> None:
    for method in METHODS.values():
        known = of_method(method.name) or of_method(presets._LIKE.get(method.name, ""))
        assert known or method.family == "transport"


# ------------------------------------------------------------------------- the units


def test_levels_of_edm_come_out_in_units_of_sigma_data() -> None:
    """EDM's grid as its authors write it, and the level that SiD's paper names."""
    i = np.arange(1001)
    sigma = (80 ** (1 / 7) + i / 1000 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # eq. 5, falling
    at_800 = sigma[1000 - 800]
    assert at_800 == pytest.approx(24.4, abs=0.05)
    settings = PRESETS[SID].settings
    assert settings["noise_high"].value * 0.5 == pytest.approx(at_800, rel=1e-4)
    assert settings["student_sigma"].value * 0.5 == 2.5
    assert settings["noise_low"].value * 0.5 == pytest.approx(0.002)
    grid = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 1000) ** 7  # DMD2's, rising
    dmd2 = PRESETS["paper:dmd2-imagenet64"].settings
    for setting, step in (("noise_low", 20), ("noise_high", 980)):
        assert dmd2[setting].value * 0.5 == pytest.approx(grid[step], rel=1e-4)


def test_the_law_of_edm_has_the_same_median_in_both_units() -> None:
    settings = PRESETS[SID].settings
    assert 0.5 * math.exp(settings["noise_mean"].value) == pytest.approx(math.exp(-1.2), rel=1e-4)
    assert settings["noise_std"].value == 1.2
    flow = PRESETS["paper:mean-flow-cifar10"].settings  # logit t = log sigma for t = sigma / (1 + sigma)
    t = 1 / (1 + math.exp(0.6))
    assert 0.5 * math.exp(flow["level_mean"].value) == pytest.approx(t / (1 - t), rel=1e-4)


def test_a_step_of_ddpm_is_its_ratio_of_noise_to_signal() -> None:
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for step in (0, 500, 800, 999):
        level = math.sqrt((1 - kept[step]) / kept[step])
        assert 0.5 * units.ddpm_level(step) == pytest.approx(level, rel=1e-4)


def test_averages_forget_as_the_published_ones() -> None:
    """What is left of an old weight after an epoch of 50,000 images, and after 10,000 steps."""
    images, batch = 0.5e6, 256
    theirs = (0.5 ** (batch / images)) ** (50_000 / batch)  # EDM's and SiD's formula
    ours = 0.5 ** (50_000 / batch / PRESETS[SID].settings["ema_half_life"].value)
    assert ours == pytest.approx(theirs, rel=1e-4)
    half_life = PRESETS["paper:scm-cifar10"].settings["ema_half_life"].value
    assert 0.5 ** (10_000 / half_life) == pytest.approx(0.9999**10_000, rel=1e-3)
    f_distill = PRESETS["paper:f-distill-cifar10"].settings  # 10,000 steps are 2,000 updates
    assert f_distill["fake_score_steps"].value == 5
    assert 0.5 ** (2_000 / f_distill["ema_half_life"].value) == pytest.approx(0.9999**10_000, rel=1e-3)


def test_guidance_beyond_the_conditional_one_is_one_more() -> None:
    """rCM adds w (F_c - F_0) to F_c; here the scale s is that of F_0 + s (F_c - F_0)."""
    conditional, free, w = 3.0, 1.0, 5.0
    scale = PRESETS["paper:rcm-wan1.3b"].settings["guidance"].value
    assert free + scale * (conditional - free) == conditional + w * (conditional - free)


# ------------------------------------------------------------------------- which value it comes to


def resolved(line: str) -> dict[str, Any]:
    shown: dict[str, Any] = done(f"distill {line} --dry-run --json").json()
    assert shown["preset"] == shown["options"]["preset"]
    return shown["options"]


def test_options_win_over_files_over_presets_over_defaults(tmp_path: Path) -> None:
    plain = resolved(f"{SHORT} --method sid --steps 6")
    assert (plain["preset"], plain["distill"]["lr"], plain["distill"]["beta1"]) == (LAPTOP, 5e-4, 0.9)
    first = resolved(f"{SHORT} --preset {SID} --steps 4")
    assert (first["method"], first["preset"]) == ("sid", SID)
    assert (first["distill"]["lr"], first["distill"]["beta1"], first["run"]["batch"]) == (1e-5, 0.0, 8)
    assert first["distill"]["weight_decay"] == plain["distill"]["weight_decay"]  # not in the preset
    file = tmp_path / "c.toml"
    file.write_text(f'format = 3\npreset = "{SID}"\n[distill]\nlr = 3e-5\nlr_critic = 4e-5\n')
    second = resolved(f"{SHORT} --config {file} --steps 4 --lr-fake-score 7e-5")
    assert (second["method"], second["preset"]) == ("sid", SID)
    assert (second["distill"]["lr"], second["distill"]["lr_fake_score"], second["distill"]["beta1"]) == (
        *(3e-5, 7e-5),
        0.0,
    )


@pytest.mark.slow
def test_another_preset_leaves_what_was_chosen_and_nothing_else(tmp_path: Path) -> None:
    done(f"distill {SHORT} --preset {SID} --steps 5 --lr 2e-5 --out {tmp_path}/run")
    config = tmp_path / "run/config.toml"
    written = tomllib.loads(config.read_text())
    assert (written["preset"], written["distill"]["noise_high"]) == (SID, 48.817)
    shown = tomllib.loads(done(f"distill --config {config} --dry-run").out)
    idle = {
        "negative_prompt",
        "guidance_rescale",
        "guidance_interval",
        "base_dtype",
    }  # do nothing in this run
    idle |= {f"lora_{name}" for name in ("targets", "alpha", "rank")}
    assert written["distill"].keys() - shown["distill"].keys() == idle
    assert shown["distill"] == {name: written["distill"][name] for name in shown["distill"]}
    assert {**shown, "distill": written["distill"]} == written
    for line, method, lr_fake_score in (
        ("--preset laptop", "sid", 1e-3),
        ("--preset paper:sid-imagenet64", "sid", 4e-6),
        ("--preset paper:diff-instruct-cifar10", "diff-instruct", 1e-5),
        ("--method sim --preset laptop", "sim", 1e-3),
    ):
        other = resolved(f"--config {config} {line}")
        assert (other["method"], other["distill"]["lr"], other["distill"]["lr_fake_score"]) == (
            *(method, 2e-5),
            lr_fake_score,
        )
        assert other["run"]["batch"] == 8
    assert resolved(f"--config {config} --preset laptop")["distill"]["fake_score_distribution"] == "same"


def test_a_run_goes_on_with_its_preset(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(f"distill {SHORT} --preset {SID} --steps 3 --checkpoint-every 1 --out {run}")
    done(f"distill --out {run} --resume 2 --steps 4")
    written = tomllib.loads((run / "config.toml").read_text())
    assert (written["preset"], written["distill"]["lr"], written["run"]["steps"]) == (SID, 1e-5, 4)
    answer = command(f"distill --out {run} --resume --preset paper:sid-imagenet64 --steps 5")
    assert answer.code == 2
    assert "a resumed run keeps its --preset" in answer.err
    assert tomllib.loads((run / "config.toml").read_text()) == written


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"--preset {SID} --method dmd2", "paper:sid-cifar10 has settings of sid"),
        ("--preset paper:sid-cifar100", "did you mean paper:sid-cifar10"),
        ("--preset ''", "unknown preset"),
    ],
)
def test_what_does_not_fit_is_refused(line: str, said: str, tmp_path: Path) -> None:
    answer = command(f"distill {SHORT} --steps 3 {line} --out {tmp_path}/never")
    assert answer.code == 2
    assert said in answer.err
    assert not any(tmp_path.iterdir())


def test_published_settings_on_a_small_network_are_not_taken_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = DistillOptions.of(None, SID)
    usual = DistillOptions.of("sid")
    (warning,) = warned(options, own_teacher(), points())
    assert f"--preset {SID} is in force, --lr 1e-05, --lr-fake-score 1e-05, --steps" in warning
    assert f"--preset laptop has --lr {usual.settings.lr:g}" in warning
    run = replace(options.run, steps=50)
    mine = replace(options, run=run, settings=replace(options.settings, lr=1e-4, lr_fake_score=1e-4))
    assert warned(mine, own_teacher(), points()) == []
    assert "--steps" not in warned(replace(options, run=run), own_teacher(), points())[0]
    told = done(f"distill {SHORT} --preset {SID} --steps 3 --dry-run --json").json()["warnings"]
    assert any("published for EDM's DDPM++" in message for message in told)
    monkeypatch.setattr(presets, "LAPTOP_PARAMETERS", 100)
    assert warned(options, own_teacher(), points()) == []


def test_the_fix_names_the_presets_of_the_method() -> None:
    with pytest.raises(UserError, match="--preset paper:dmd2-imagenet64"):
        find_preset(SID, "dmd2")
    with pytest.raises(UserError, match="or choose --preset laptop"):
        find_preset(SID, "sim")
    with pytest.raises(UserError, match="has settings of sid"):
        prepare_distillation(DistillOptions(method="sim", preset=SID), own_teacher(), points())


def test_a_dry_run_says_which_preset_is_in_force() -> None:
    out = done(f"distill {SHORT} --preset {SID} --steps 3 --dry-run").out
    assert f"# preset      {SID}, EDM's DDPM++ on CIFAR-10" in out
    out = done(f"distill {SHORT} --steps 10 --dry-run").out
    assert "# preset      laptop, the defaults, for networks of fewer than 20 million" in out
    assert "# preset" not in done(f"train --data digits {TINY} --steps 2 --batch 8 --dry-run").out


@pytest.mark.slow
def test_python_has_the_same(tmp_path: Path) -> None:
    quick = {"batch": 8, "fit_steps": 2, "width": 16, "depth": 1, "quiet": True}
    dm.distill("ring8", preset=SID, steps=3, lr=3e-5, out=tmp_path / "a", **quick)
    written = tomllib.loads((tmp_path / "a/config.toml").read_text())
    assert (written["method"], written["preset"], written["run"]["steps"]) == ("sid", SID, 3)
    assert (written["distill"]["lr"], written["distill"]["lr_fake_score"]) == (3e-5, 1e-5)
    dm.distill("ring8", preset="paper:uni-instruct-cifar10", steps=400, out=tmp_path / "b", **quick)
    assert tomllib.loads((tmp_path / "b/config.toml").read_text())["divergence"] == "kl"
    with pytest.raises(UserError, match="has settings of sid"):
        dm.distill("ring8", preset=SID, method="dmd2")


def test_a_comparison_has_presets_behind_methods() -> None:
    shared = SharedOptions(run=RunOptions(batch=64))
    plain, paper, both = parse_methods(f"sid,sid[preset={SID}],mine=sid[preset={SID},lr=3e-5]")
    rates = [entry_options(shared, e, seed=1, steps=5).settings.lr for e in (plain, paper, both)]
    assert rates == [5e-4, 1e-5, 3e-5]
    options = entry_options(shared, paper, seed=1, steps=5)
    assert (options.preset, options.run.batch, options.run.steps, options.run.seed) == (SID, 64, 5, 1)
    assert entry_options(SharedOptions(), paper, seed=1, steps=5).run.batch == 256
    faster = replace(shared, settings=replace(shared.settings, lr_fake_score=2e-5))
    assert entry_options(faster, paper, seed=1, steps=5).settings.lr_fake_score == 2e-5
    answer = command(f"compare --teacher ring8 --methods sid --preset {SID} --dry-run")
    assert answer.code == 2
    assert f"NAME[preset={SID}]" in answer.err
    answer = command(f"compare --teacher ring8 --methods dmd2[preset={SID}] --dry-run")
    assert answer.code == 2
    assert "has settings of sid" in answer.err


def test_presets_name_options_that_a_run_has() -> None:
    run = {field.name for field in fields(RunOptions)}
    for preset in PRESETS.values():
        assert set(preset.settings) & run <= {"steps", "batch", "precision"}
