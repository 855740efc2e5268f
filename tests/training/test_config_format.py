"""Config files say of which format they are; noise levels in the units of the data are not misread."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from distmatch.base.errors import UserError
from distmatch.cli.parse import options_from
from distmatch.methods.table import METHODS
from distmatch.training.comparison.options import CompareOptions, parse_methods
from distmatch.training.config_format import FORMAT, config_text, read_config
from distmatch.training.options import DistillOptions, TrainOptions
from distmatch.training.toml import to_toml
from tests.helpers.command import command, done

ROOT = Path(__file__).parents[2]
_SHORT = "--net auto --width 16 --depth 1 --steps 2 --batch 16 --fit-steps 1 --fake-score-steps 1"


@pytest.mark.parametrize(
    ("verb", "options"), [("distill", DistillOptions.of("mmd")), ("train", TrainOptions())]
)
def test_what_is_written_is_read_back(tmp_path: Path, verb: str, options: object) -> None:
    file = tmp_path / "config.toml"
    file.write_text(config_text(verb, options))
    written = tomllib.loads(file.read_text())
    assert written.pop("format") == FORMAT
    assert read_config(file) == written


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[distill]\nstudent_sigma = 2.5\nnoise_high = 0.0\n", "student_sigma = 2.5"),
        ("format = 1\n[kernel]\nmmd_feature_sigma = 0.2\n", "mmd_feature_sigma = 0.2"),
        ("[shared.distill]\nnoise_low = 0.1\nnoise_high = 5.0\n", "noise_low = 0.1, noise_high = 5.0"),
        ('methods = "dmd2, low=dmd2[lr=1e-3,noise_low=0.1],sid"\n', "noise_low=0.1"),
    ],
)
def test_levels_of_an_older_file_are_refused_with_the_conversion(
    tmp_path: Path, text: str, named: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(UserError, match='divided by the "sigma_data"') as caught:
        read_config(file)
    assert named in str(caught.value)


def test_an_older_file_without_such_levels_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[distill]\nstudent_sigma = 0\nlr = 1e-4\n[consistency]\nlevel_mean = -0.3\n")
    assert read_config(file)["distill"] == {"student_sigma": 0, "lr": 1e-4, "level_mean": -0.3}
    file.write_text("format = 5\n")
    with pytest.raises(UserError, match="another format"):
        read_config(file)


def test_recipes_are_of_this_format() -> None:
    for recipe in (ROOT / "recipes").glob("*.toml"):
        read_config(recipe)


def test_the_command_line_refuses_an_older_config(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('verb = "distill"\n[distill]\nnoise_low = 0.02\n')
    answer = command(f"distill --config {tmp_path}/config.toml --teacher ring8 --dry-run")
    assert answer.code == 2
    assert "format = 4" in answer.err


# ---- format 2 had a table for each family of methods, with all settings of all of them

_TABLES = {
    "distill": {
        "lr": 1e-5,
        "lr_fake_score": 1e-5,
        "lr_decay": "constant",
        "fake_score_steps": 5,
        "gan_weight": 0.0,
    },
    "matching": {"sid_alpha": 0.9, "sim_c": 0.3, "pairs": 4096, "backtrack": 0},
    "consistency": {"level_distribution": "karras", "level_mean": -0.4, "solver_steps": 1, "gamma": 0.0},
    "kernel": {"mmd_kernel": "auto", "mmd_checkpoint": False, "imm_particles": 4},
    "transport": {"bank": 512, "blend": 0.0},
}


def of_format_2(file: Path, **other: dict[str, object]) -> Path:
    tables = {name: {**table, **other.get(name, {})} for name, table in _TABLES.items()}
    head = {"verb": "distill", "format": 2, "teacher": "ring8", "method": "sid", "preset": "laptop"}
    file.write_text(to_toml({**head, **tables}))
    return file


def test_a_file_of_format_2_is_read_with_a_warning(tmp_path: Path) -> None:
    file = of_format_2(tmp_path / "config.toml")
    with pytest.warns(UserWarning, match=r"of format 2 .* all settings of a method in \[distill\]"):
        values = read_config(file)
    assert values.keys() == {"verb", "teacher", "method", "preset", "distill"}
    own = {"lr": 1e-5, "lr_fake_score": 1e-5, "lr_decay": "constant", "fake_score_steps": 5}
    own |= {"sid_alpha": 0.9, "backtrack": 0}
    assert values["distill"] == own  # what sid does not read is gone, as it was at its default
    shown = done(f"distill --config {file} --dry-run --json {_SHORT} --steps 8").json()["options"]
    assert (shown["distill"]["sid_alpha"], shown["distill"]["lr"]) == (0.9, 1e-5)
    other = done(f"distill --config {file} --method sida --dry-run --json {_SHORT}")
    assert other.json()["options"]["distill"]["sid_alpha"] == 0.9
    assert "of format 2" in other.err


def test_a_setting_of_an_older_file_that_never_did_anything_is_refused(tmp_path: Path) -> None:
    file = of_format_2(tmp_path / "config.toml", kernel={"imm_particles": 8})
    answer = command(f"distill --config {file} --dry-run")
    assert (answer.code, "--imm-particles does nothing with --method sid" in answer.err) == (2, True)


def test_a_run_of_format_2_goes_on(begun: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    values = tomllib.loads((run / "config.toml").read_text())
    values["distill"]["pairs"] = 4096  # settings of families were in tables of their own
    (run / "config.toml").write_text(to_toml({**values, "format": 2, "transport": _TABLES["transport"]}))
    assert done(f"distill --out {run} --resume --steps 3").err.count("is of format 2") == 1
    written = tomllib.loads((run / "config.toml").read_text())
    assert (written["format"], "transport" in written) == (FORMAT, False)
    assert written["distill"] == tomllib.loads((begun / "config.toml").read_text())["distill"]


def test_a_comparison_of_format_2_shares_what_was_not_the_default(tmp_path: Path) -> None:
    shared = {"method": "f-distill", "preset": "laptop", "teacher": "ring8", **_TABLES}
    file = tmp_path / "config.toml"
    file.write_text(to_toml({"verb": "compare", "format": 2, "methods": "sid,imm", "shared": shared}))
    with pytest.warns(UserWarning, match="of format 2"):
        options = options_from(CompareOptions, file, "compare")
    assert options.shared.given() == {"lr": 1e-5, "lr_fake_score": 1e-5, "gan_weight": 0.0, "sid_alpha": 0.9}
    assert options.shared.teacher == "ring8"


# ---- what is chosen where nobody chooses stands in the file


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default method on an exact teacher, without a divergence or a network named."""
    out = tmp_path_factory.mktemp("begun") / "run"
    done(f"distill --teacher ring8 {_SHORT} --out {out}")
    return out


def test_the_divergence_and_the_network_of_a_run_stand_in_its_config(begun: Path) -> None:
    config = read_config(begun / "config.toml")
    assert config["divergence"] == "js"
    assert config["net"]["net"] == "mlp"
    for name, method in METHODS.items():
        expected = {"any": method.default_divergence, "": None}.get(method.divergences, method.divergences)
        assert DistillOptions.of(name).divergence == expected


def test_another_default_does_not_change_what_a_config_repeats(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "f-distill", replace(METHODS["f-distill"], default_divergence="kl"))
    line = "distill --teacher ring8 --dry-run --json"
    assert done(f"{line} {_SHORT}").json()["options"]["divergence"] == "kl"
    assert done(f"{line} --config {begun}/config.toml").json()["options"]["divergence"] == "js"


def test_a_default_divergence_is_nobodys_choice_for_another_method(begun: Path) -> None:
    line = f"distill --config {begun}/config.toml --dry-run --json"
    assert done(f"{line} --method diff-instruct").json()["options"]["divergence"] == "reverse_kl"
    assert done(f"{line} --method sid --steps 20").json()["options"]["divergence"] is None
    chosen = begun.parent / "kl.toml"
    chosen.write_text((begun / "config.toml").read_text().replace('"js"', '"kl"'))
    assert "--divergence kl" in command(f"distill --config {chosen} --method sid --dry-run").err


def test_a_run_of_an_older_file_goes_on(begun: Path, tmp_path: Path) -> None:
    """Files of earlier releases have no divergence where none was named, and ``auto`` for an MLP."""
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    text = (run / "config.toml").read_text()
    older = text.replace('divergence = "js"\n', "").replace('net = "mlp"', 'net = "auto"')
    assert len(older) < len(text) - 10
    (run / "config.toml").write_text(older)
    done(f"distill --out {run} --resume --steps 3")
    config = read_config(run / "config.toml")
    assert (config["divergence"], config["net"]["net"], config["run"]["steps"]) == ("js", "mlp", 3)
    (run / "config.toml").write_text(older)
    for other, words in (("--divergence kl", "--divergence kl"), ("--width 24", "--width 24")):
        assert words in command(f"distill --out {run} --resume {other}").err


def test_a_teacher_of_digits_says_its_network(tmp_path: Path) -> None:
    done(f"train --steps 1 --batch 4 --width 16 --depth 1 --out {tmp_path}/teacher")
    assert read_config(tmp_path / "teacher/config.toml")["net"]["net"] == "mlp"


def test_settings_of_format_3_have_new_names(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('format = 3\nmethod = "f-distill"\n[distill]\ncalls = 2\nlr_critic = 2e-4\nlr = 1e-4\n')
    with pytest.warns(UserWarning, match="new names"):
        assert read_config(file)["distill"] == {"num_steps": 2, "lr_fake_score": 2e-4, "lr": 1e-4}


def test_old_options_are_understood_with_a_warning() -> None:
    line = "distill --teacher ring8 --method dmd2 --critic-steps 3 --calls=2 --dry-run --json"
    answer = command(line)
    assert answer.code == 0
    found = json.loads(answer.out)["options"]["distill"]
    assert (found["fake_score_steps"], found["num_steps"]) == (3, 2)
    assert "--critic-steps is now called --fake-score-steps" in answer.err + answer.out
    assert parse_methods("dmd2[critic_steps=2]")[0].settings == {"fake_score_steps": 2}


def test_a_setting_under_both_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('format = 3\nverb = "distill"\n[distill]\ncalls = 2\nnum_steps = 3\n')
    with pytest.raises(UserError, match="given twice"):
        read_config(file)
    assert command("distill --teacher ring8 --calls 2 --num-steps 4 --dry-run").code == 2


def test_a_method_that_is_a_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('verb = "distill"\nteacher = "ring8"\n[method]\ncalls = 2\n')
    answer = command(f"distill --config {file} --dry-run")
    assert answer.code == 2
    assert "method must be a name" in answer.err
