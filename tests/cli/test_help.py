"""`--help`, `--help-all`, short options, and what is said of unknown ones."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distmatch.cli.main import VERBS
from distmatch.cli.parse import Place, TrainingPlace
from distmatch.training.comparison.options import CompareOptions
from distmatch.training.options import DistillOptions, TrainOptions
from tests.helpers.command import command, done

RUNS = {"train": TrainOptions, "distill": DistillOptions, "compare": CompareOptions}
SCREEN = 45


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def fields_of(options: Any) -> list[str]:
    """Names of the fields of a dataclass (or of its class) and of those inside it."""
    names: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name, None)
        if value is None and callable(field.default_factory):
            value = field.default_factory()
        names += fields_of(value) if dataclasses.is_dataclass(value) else [field.name]
    return names


def options_of(verb: str) -> list[str]:
    module = importlib.import_module(VERBS[verb][0])
    if verb in RUNS:
        hidden = module.HELP.hidden
        place = Place() if verb == "compare" else TrainingPlace()
        return [name for name in fields_of(RUNS[verb]()) + fields_of(place) if name not in hidden]
    own = getattr(module, f"{verb.capitalize()}Options")
    return fields_of(own)


def shown(text: str) -> list[str]:
    """The options that a help text has, in its order."""
    found = re.findall(r"^  (?:-\w, )?(?:--(?:\[no-\])?([a-z][\w-]*)|([A-Z]+)\b)", text, re.MULTILINE)
    return [(flag or place.lower()).replace("-", "_") for flag, place in found]


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_a_screen(verb: str) -> None:
    text = done(f"{verb} --help").out
    assert text.count("\n") <= SCREEN
    groups = text[text.index("Options:") :]
    assert max(map(len, groups.splitlines())) <= 80
    assert done(f"{verb} -h").out == text


@pytest.mark.parametrize("verb", VERBS)
def test_all_help_shows_every_option_once_in_one_group(verb: str) -> None:
    text = done(f"{verb} --help-all").out
    names = [{"reference": "against"}.get(name, name) for name in shown(text)]
    assert sorted(names) == sorted(options_of(verb))
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert len(titles) == len(set(titles))
    short = done(f"{verb} --help").out
    left = re.search(r"(\d+) more options: distmatch \w+ --help-all", short)
    assert len(shown(short)) + (int(left[1]) if left else 0) == len(names)


@pytest.mark.parametrize("verb", VERBS)
def test_what_help_arranges_are_options(verb: str) -> None:
    said = importlib.import_module(VERBS[verb][0]).HELP
    arranged = [*said.short.split(), *" ".join(said.groups.values()).split()]
    assert set(arranged) <= set(options_of(verb))


def test_the_help_of_a_method_is_its_own() -> None:
    """Its defaults, and only options that it does not refuse as idle."""
    text = done("distill --method sid --help-all").out
    names = shown(text)
    assert {"sid_alpha", "fake_score_steps", "lr", "out"} <= set(names)
    assert not {"gan_weight", "imm_particles", "tangent", "bank", "sim_c", "divergence"} & set(names)
    assert all(word in done("train --help").out for word in ("digits", "skewed2", ".csv", ":one-hot"))
    short = done("distill --method sid --help").out
    assert "--method sid --out" in short
    assert "--method dmd2" not in short
    assert "--divergence" not in short
    answer = command("distill --method sid --gan-weight 0.5 --teacher ring8 --out never")
    assert "--gan-weight does nothing with --method sid" in answer.err
    assert "fake_score_steps" not in shown(done("distill --method scm --help-all").out)
    for method, steps in {"rcm": 1, "sid": 5}.items():
        line = re.search(r"--fake-score-steps .*", done(f"distill --method {method} --help-all").out)
        assert line
        assert f"(default: {steps})" in line[0]


def test_short_options(tmp_path: Path) -> None:
    done(f"sample ring8 -n 5 --steps 2 -o {tmp_path}/a.npz")
    done(f"sample ring8 -n=5 --steps 2 -o={tmp_path}/b.npz")
    for name in ("a", "b"):
        assert len(np.load(tmp_path / f"{name}.npz")["x"]) == 5
    (tmp_path / "c.toml").write_text('verb = "train"\n[run]\nbatch = 24\n')
    answer = done(
        f"train -c {tmp_path}/c.toml -o {tmp_path}/run --net mlp --width 8 --depth 1 --dry-run --json"
    )
    assert answer.json()["options"]["run"]["batch"] == 24
    assert command("doctor -o x").code == 2


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("sample ring8 --num-samples 3", "--n"),
        ("sample ring8 --output=x", "--out"),
        ("sample ring8 --sampler heun", "--solver"),
        ("sample ring8 --sovler heun", "--solver"),
        ("distill --learning_rate 3", "--lr"),
        ("train --batch-size 3", "--batch"),
        ("train --epochs 3", "--steps"),
        ("doctor --epochs 3", None),
    ],
)
def test_an_unknown_option_names_the_one_that_was_meant(line: str, meant: str | None) -> None:
    answer = command(line)
    assert answer.code == 2
    assert "unknown option" in answer.err
    found = re.search(r"did you mean (\S+)\?", answer.err)
    assert (found and found[1]) == meant
