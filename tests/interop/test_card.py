"""Model cards: what they say, that model hubs read them, that measurements reach them and edits survive."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.data import load_data
from distmatch.interop.card import LICENSE, metrics_section, refresh_card
from distmatch.interop.saved import load_denoiser, save_denoiser
from distmatch.methods.student import Student
from distmatch.training.evaluation import write_evaluation
from distmatch.training.runfolder import RunFolder
from tests.helpers.command import command, contents, done
from tests.helpers.small import network_teacher

INFO = {
    "method": "f-distill",
    "divergence": "js",
    "teacher": "runs/teacher",
    "guidance": 1.5,
    "seed": 3,
    "data": {"spec": "digits", "samples": 1797, "content_hash": "abc123", "class_names": ["0", "a|b", "2"]},
}
METRICS = {
    "reference": {"nfe": 0, "fd": {"value": 0.1, "stderr": 0.01, "n": 100}},
    "teacher": {"nfe": 35, "fd": {"value": 0.2, "stderr": 0.03, "n": 100}, "kl": {"value": None, "n": 100}},
    "student": {"nfe": 1, "fd": {"value": 0.5, "stderr": 0.04, "n": 100}, "kl": {"value": 1.0, "n": 100}},
}


def student(classes: int = 3, info: dict[str, object] | None = None) -> Student:
    return Student(network_teacher(classes), (2.5,), info or INFO)


def rows(text: str) -> dict[str, list[str]]:
    """The cells of all tables by the first of a row."""
    cells = [
        line.strip("|").replace("\\|", "/").split("|") for line in text.splitlines() if line.startswith("|")
    ]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in cells}


def test_a_card_says_how_the_teacher_was_guided(tmp_path: Path) -> None:
    more = {"guidance_interval": [0.3, 5.0], "guidance_rescale": 0.7, "negative_prompt": "a | b"}
    student(info={**INFO, **more}).save_pretrained(tmp_path / "m")
    said = rows((tmp_path / "m/README.md").read_text())["guidance of the teacher"][0]
    assert said == (
        "1.5, at noise levels from 0.3 to 5, in units of sigma_data, rescaled by 0.7, away from 'a / b'"
    )
    scaled = student(info={**INFO, "guidance": 1.0, "guidance_range": (1.0, 6.0)})
    scaled.save_pretrained(tmp_path / "n")
    said = rows((tmp_path / "n/README.md").read_text())["guidance of the teacher"][0]
    assert said == "none, received as an input, from 1 to 6"


def test_a_card_says_what_the_model_is(tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "m", metrics=METRICS)
    text = (tmp_path / "m/README.md").read_text()
    said = {key: value[0] for key, value in rows(text).items()}
    assert said["method"] == "f-distill"
    assert said["divergence"] == "js"
    assert said["network calls"] == "1, at noise level 2.5"
    assert said["teacher"] == "runs/teacher"
    assert said["guidance of the teacher"] == "1.5"
    assert said["data"] == "digits, 1,797 samples"
    assert said["hash of the data"] == "sha256 abc123"
    assert said["classes"] == "3 (0, a/b, 2)"
    assert said["licence"] == LICENSE
    assert f"torch {torch.__version__}" in said["written by"]
    assert "What was lost" in text
    # 0.5 - 0.2, with the error sqrt(0.04^2 + 0.03^2).
    assert rows(text)["fd"] == ["0.1 ± 0.01", "0.2 ± 0.03", "0.5 ± 0.04", "+0.3 ± 0.05"]
    assert rows(text)["kl"] == ["-", "-", "1", "-"]


@pytest.mark.parametrize(
    ("teacher", "base"),
    [
        ("runs/teacher", "runs/teacher"),
        ("/somewhere/my teacher/", "my-teacher"),
        ("ring8", "ring8"),
        ("", None),
    ],
)
def test_the_head_names_teacher_and_data_as_hubs_read_them(tmp_path: Path, teacher: str, base: str) -> None:
    yaml = pytest.importorskip("yaml")
    info = INFO | {"teacher": teacher, "data": {"spec": "../pictures of birds.npz"}}
    student(info=info).save_pretrained(tmp_path / "m")
    head = yaml.safe_load((tmp_path / "m/README.md").read_text().split("---")[1])
    assert head.get("base_model") == base
    assert head["datasets"] == ["pictures-of-birds.npz"]


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a\u202egnp.exe",
    "[b](javascript:alert(1))",
    "![c](http://x/y)",
    "`d`",
    "e|f\n# g",
    "&lt;h",
    "$i$",
]


def test_names_of_any_origin_are_shown_and_do_nothing(tmp_path: Path) -> None:
    """Class names and paths come from files of others; a hub renders Markdown with HTML in it."""
    data = {"spec": HOSTILE[0], "samples": 3, "content_hash": HOSTILE[1], "class_names": HOSTILE}
    info = INFO | {"data": data, "teacher": HOSTILE[1], "method": HOSTILE[0], "license": HOSTILE[2]}
    metrics = {name: {HOSTILE[1]: values["fd"]} for name, values in METRICS.items()}
    student(len(HOSTILE), info).save_pretrained(tmp_path / "m", metrics=metrics)
    _, head, body = (tmp_path / "m/README.md").read_text().split("---\n", 2)
    assert "\u202e" not in head + body
    assert "U+202E" in body
    prose = body.replace("<!-- metrics -->", "").replace("<!-- end of metrics -->", "")
    assert "<" not in prose.split("```")[0] + prose.split("```")[2]
    # Back from escapes of Markdown, then from those of HTML, the names are what they were.
    (line,) = (line for line in body.splitlines() if line.startswith("| classes |"))
    shown = line.removeprefix("| classes | ").removesuffix(" |")
    assert html.unescape(re.sub(r"\\(.)", r"\1", shown)) == (
        f"{len(HOSTILE)} ({', '.join(HOSTILE)})".replace("\u202e", "U+202E").replace("\n", " ")
    )
    assert not re.search(r"(?<!\\)[\[\]`$|]", shown)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    Student(network_teacher(), (2.5, 0.5)).save_pretrained(tmp_path / "m")
    text = (tmp_path / "m/README.md").read_text()
    assert not {"method", "divergence", "teacher", "data", "guidance of the teacher"} & rows(text).keys()
    assert rows(text)["between calls"] == ["stochastic"]
    assert "Not measured" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("given", "known"),
    [("", "unknown"), ("apache-2.0", "apache-2.0"), ('My: "own" terms', "other")],
)
def test_model_hubs_read_the_head(given: str, known: str, tmp_path: Path) -> None:
    ModelCard = pytest.importorskip("huggingface_hub").ModelCard
    student().save_pretrained(tmp_path / "m", license=given)
    head = ModelCard.load(tmp_path / "m/README.md").data
    assert head.license == known
    assert head.license_name == (given if known == "other" else None)
    assert head.library_name == "distmatch"
    assert "one-step" in head.tags
    back = Student.from_pretrained(tmp_path / "m")
    assert back.info.get("license", "") == given
    back.save_pretrained(tmp_path / "again")  # it stays with the model
    assert ModelCard.load(tmp_path / "again/README.md").data.license == known


def test_the_snippet_in_a_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scaling = load_data("digits").scaling.to_dict()
    info = {**INFO, "data": {**INFO["data"], "scaling": scaling}}
    Student(network_teacher(0, (1, 8, 8)), (2.5,), info).save_pretrained("this/folder")
    code = Path("this/folder/README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["samples"].shape == (16, 8, 8)


def test_measurements_reach_the_card_and_edits_survive(tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "m")
    card = tmp_path / "m/README.md"
    card.write_text(card.read_text().replace("## Intended use", "My own words.\n\n## Intended use"))
    weights = (tmp_path / "m/model.safetensors").read_bytes()
    refresh_card(tmp_path / "m", METRICS)
    once = card.read_text()
    assert "My own words." in once
    assert "Not measured" not in once
    assert rows(once)["nfe"] == ["0", "35", "1", "-"]
    refresh_card(tmp_path / "m", {"student": {"fd": {"value": 7.0, "stderr": None, "n": 5}}})
    assert rows(card.read_text())["fd"] == ["7"]
    refresh_card(tmp_path / "m", METRICS)
    assert card.read_text() == once
    assert (tmp_path / "m/model.safetensors").read_bytes() == weights
    # A card without the place, and a folder without a card, are left alone.
    for own in ("mine", "<!-- metrics --> mine"):
        card.write_text(own)
        refresh_card(tmp_path / "m", METRICS)
        assert card.read_text() == own
    refresh_card(tmp_path / "nothing", METRICS)
    assert not (tmp_path / "nothing").exists()


def test_evaluating_a_run_and_exporting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_data("digits")
    teacher = network_teacher(0, (1, 8, 8))
    dm.distill(teacher, data, steps=2, batch=8, fake_score_steps=1, fit_steps=1, out="run", quiet=True)
    card = Path("run/model/README.md")
    assert rows(card.read_text())["hash of the data"] == [f"sha256 {data.content_hash}"]
    measured = {"student": {"nfe": 1, "fd": Estimate(0.25, 0.5, 10)}}
    write_evaluation(RunFolder(Path("run")), measured, {}, data.scaling, {})
    assert rows(card.read_text())["fd"] == ["0.25 ± 0.5"]
    done("export run --license mit --out out")
    exported = Path("out/README.md").read_text()
    assert rows(exported)["fd"] == ["0.25 ± 0.5"]
    assert rows(exported)["licence"] == ["mit"]
    assert json.loads(Path("out/config.json").read_text())["extra"]["license"] == "mit"
    assert command("export run --out out").code == 2


def test_teachers_have_cards_too(tmp_path: Path) -> None:
    save_denoiser(tmp_path / "m", network_teacher(), {"kind": "teacher"})
    text = (tmp_path / "m/README.md").read_text()
    assert "dm.load_teacher" in text
    assert "distilled into" in text
    save_denoiser(tmp_path / "m", network_teacher(), {"kind": "teacher"})  # a card is part of a model folder
    assert load_denoiser(tmp_path / "m")[1] == {"kind": "teacher"}


def test_a_readme_of_somebody_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my project")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not a model folder"):
        student().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_no_measurements_is_said() -> None:
    assert "Not measured" in metrics_section(None)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", None),
        ("../models/sd3", ""),
        ("/models/sd3", ""),
        ("sd3", ""),
    ],
)
def test_a_card_names_the_base_as_its_folder_does(said, name, tmp_path):
    """A name on a hub, which diffusers keeps in model_index.json, but not a path of another machine."""
    from distmatch.interop.card import card_of
    from distmatch.interop.pipelines import load_pipeline
    from distmatch.interop.pipelines.steps import with_schedule
    from tests.helpers.pipelines import SIZE, save  # which needs diffusers

    folder = save("stable-diffusion-3", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_name_or_path": said}))
    teacher = load_pipeline(folder, **SIZE["stable-diffusion-3"])
    about = {"kind": "student", "levels": [1.0], "teacher": str(folder)}
    card = card_of(teacher, with_schedule(teacher, about))
    assert f'base_model: "{said if name is None else folder.name}"' in card
    assert ("a local folder" in card) == (name is not None)
    assert str(tmp_path) not in card
