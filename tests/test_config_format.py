"""Config files say of which format they are; noise levels in the units of the data are not misread."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from command import command
from distmatch.base.errors import UserError
from distmatch.training.config_format import FORMAT, config_text, read_config
from distmatch.training.options import DistillOptions, TrainOptions

ROOT = Path(__file__).parents[1]


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
    assert read_config(file)["distill"] == {"student_sigma": 0, "lr": 1e-4}
    file.write_text("format = 3\n")
    with pytest.raises(UserError, match="another format"):
        read_config(file)


def test_recipes_are_of_this_format() -> None:
    for recipe in (ROOT / "recipes").glob("*.toml"):
        read_config(recipe)


def test_the_command_line_refuses_an_older_config(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('verb = "distill"\n[distill]\nnoise_low = 0.02\n')
    answer = command(f"distill --config {tmp_path}/config.toml --teacher ring8 --dry-run")
    assert answer.code == 2
    assert "format = 2" in answer.err
