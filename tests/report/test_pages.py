"""The report page: built on run folders that are made here, checked against the files it was made from."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from distmatch.base.errors import UserError
from distmatch.report import build_report

SIGMA_EDGES = np.geomspace(0.02, 80, 11).round(4).tolist()


def estimate(value: float | None, stderr: float | None, n: int = 800) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": n}


def demo_metrics() -> dict[str, Any]:
    def block(
        nfe: int | None, seconds: float | None, *numbers: tuple[float | None, float | None]
    ) -> dict[str, Any]:
        keys = ("fd", "kid", "precision", "recall", "density", "coverage", "vendi", "label_accuracy")
        values = {k: estimate(*pair) for k, pair in zip(keys, numbers, strict=True)}
        return {"nfe": nfe, "seconds_per_1000": seconds, **values}

    return {
        "reference": block(
            None, None, (0.0512, 0.0041), (0.00012, 0.00021), (0.941, 0.008), (0.943, 0.008),
            (1.004, 0.021), (0.962, 0.006), (11.42, 0.11), (0.981, 0.007),
        ),
        "teacher": block(
            35, 0.6132, (0.371, 0.021), (0.00342, 0.00041), (0.932, 0.009), (0.902, 0.011),
            (1.051, 0.024), (0.941, 0.008), (11.21, 0.12), (0.987, 0.004),
        ),
        "student": block(
            1, 0.0211, (0.3304, 0.0183), (0.00297, 0.00038), (0.944, 0.008), (0.8221, 0.0142),
            (1.213, 0.029), (0.917, 0.01), (10.62, 0.12), (0.991, 0.0033),
        ),
    }  # fmt: skip


def write_log(path: Path, events: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def student_events(steps: int = 3000) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    events: list[dict[str, Any]] = [
        {
            "event": "start",
            "step": 0,
            "time": 1e9,
            "kind": "distill",
            "method": "dmd2",
            "sigma_bins": SIGMA_EDGES,
        }
    ]
    for step in range(5, steps + 1, 5):
        s = step / steps
        ratio = 1 + (1 - 0.8 * s) * 0.6 * np.sin(np.linspace(-1, 2, 10)) + 0.03 * rng.standard_normal(10)
        event: dict[str, Any] = {"event": "train", "step": step, "time": 1e9 + step * 0.046}
        event |= {
            "loss_student": 0.5 * math.exp(-3 * s) * rng.gamma(9, 1 / 9),
            "loss_fake": 0.3 + 0.4 * math.exp(-6 * s) + 0.03 * rng.standard_normal(),
            "loss_ratio": 1.386 - 0.2 * math.exp(-2 * s) + 0.01 * rng.standard_normal(),
            "loss_gan": 0.69 + 0.1 * math.exp(-2 * s) + 0.02 * rng.standard_normal(),
            "ess": min(1.0, 0.8 + 0.15 * s + 0.02 * rng.standard_normal()),
            "clip_fraction": max(0.0, 0.02 * math.exp(-3 * s) + 0.002 * rng.standard_normal()),
            "grad_dm": 4 * math.exp(-4 * s) * rng.gamma(9, 1 / 9),
            "grad_gan": 0.01 * rng.gamma(4, 1 / 4),
            "ratio_mean": ratio.tolist(),
            "weight_mean": (ratio / ratio.mean()).tolist(),
        }
        events.append(event)
    message = "ratio normalisation: a noise bin gathers 51.2 samples at batch 256; its mean is pooled."
    events.insert(40, {"event": "warning", "step": 195, "time": 1e9 + 9, "message": message})
    events.append({"event": "end", "step": steps, "time": 1e9 + steps * 0.046})
    measured = {"features": "classifier", "n": 800, "groups": 10, "guidance": 1.0, "reference": False}
    events.append({"event": "evaluate", "step": None, "time": 2e9, **measured})
    return events


def teacher_events(steps: int = 3000) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    times = range(10, steps + 1, 10)
    return [
        {
            "event": "train", "step": t, "time": 1e9 + t * 0.018, "loss": 0.2 + 2 * math.exp(-t / 300),
            "grad_norm": float(rng.gamma(9, 0.1)), "lr": 1e-3 * min(1, t / 200),
        }
        for t in times
    ]  # fmt: skip


def make_images(folder: Path) -> None:
    digits = load_digits()
    x = (digits.images * 255 / 16).astype(np.uint8)
    (folder / "samples").mkdir(parents=True)
    for i, model in enumerate(("reference", "teacher", "student")):
        at = np.random.default_rng(i).permutation(len(x))[:400]
        np.savez(folder / "samples" / f"{model}.npz", x=x[at], labels=digits.target[at].astype(np.int64))


def make_run(folder: Path) -> Path:
    """A complete run folder like the demo's."""
    make_images(folder)
    (folder / "metrics.json").write_text(json.dumps(demo_metrics()))
    (folder / "config.toml").write_text(
        'data = "digits"\nsteps = 3000\nseed = 0\n\n[distill]\nmethod = "f-distill"\ndivergence = "js"\n'
    )
    env = {
        "time": "2026-01-01T00:00:00+00:00",
        "command": "distmatch distill --teacher runs/demo/teacher --divergence js --steps 3000 --out demo",
        "git_commit": None,
        "python": "3.11.2",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "devices": [{"device": "cpu", "cores": 2, "torch_threads": 2}],
    }
    (folder / "env.json").write_text(json.dumps(env))
    write_log(folder / "log.jsonl", student_events())
    write_log(folder / "teacher" / "log.jsonl", teacher_events())
    (folder / "teacher" / "config.toml").write_text('kind = "teacher"\nsteps = 3000\n')
    return folder


def make_vectors(folder: Path, dims: int = 2) -> Path:
    """A run on a mixture of eight modes; the student has lost two of them. No log, no config."""
    (folder / "samples").mkdir(parents=True)
    for i, (model, modes) in enumerate((("reference", 8), ("teacher", 8), ("student", 6))):
        rng = np.random.default_rng(i)
        angle = rng.integers(0, modes, 2000) * math.pi / 4
        x = 0.12 * rng.standard_normal((2000, dims))
        x[:, -1] += 2 * np.cos(angle)
        x[:, 0] += 2 * np.sin(angle) if dims > 1 else 0
        np.savez(folder / "samples" / f"{model}.npz", x=x.astype(np.float32))
    block = {
        "nfe": 35,
        "seconds_per_1000": 0.1,
        "modes": estimate(8, 0.0),
        "reverse_kl": estimate(None, None),
    }
    (folder / "metrics.json").write_text(json.dumps({"teacher": block, "student": {**block, "nfe": 1}}))
    return folder


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.cells: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append((dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells:
            self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] + data)

    def having(self, attribute: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if attribute in attrs]


def page(folder: Path) -> tuple[str, Page]:
    path = build_report(folder)
    assert path == folder / "report.html"
    text = path.read_text()
    return text, Page(text)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def built(demo: Path) -> tuple[str, Page]:
    return page(demo)


def test_the_longer_bar_is_that_of_the_faster_model(built: tuple[str, Page]) -> None:
    lengths = {
        name: float(share) for name, share in re.findall(r'bar (\w+)" style="width:([\d.]+)%', built[0])
    }
    assert lengths["student"] == 100
    assert 0 < lengths["teacher"] < 50


def test_page_needs_nothing_from_outside(built: tuple[str, Page]) -> None:
    text, parsed = built
    assert "://" not in text  # no address at all, not even a namespace
    sources = [str(a["src"]) for a in parsed.having("src")]
    assert len(sources) == 3
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert all(str(a["href"]).startswith("#") for a in parsed.having("href"))
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    policy = next(a for a in parsed.having("http-equiv") if a["http-equiv"] == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none';")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_every_number_of_the_table_is_that_of_the_metrics_file(demo: Path, built: tuple[str, Page]) -> None:
    _, parsed = built
    metrics = json.loads((demo / "metrics.json").read_text())
    seen = set()
    for attrs, text in parsed.cells:
        if "data-metric" not in attrs:
            continue
        model, key = str(attrs["data-model"]), str(attrs["data-metric"])
        entry = metrics[model][key]
        assert float(str(attrs["data-value"])) == entry["value"]
        assert float(str(attrs["data-stderr"])) == entry["stderr"]
        assert int(str(attrs["data-n"])) == entry["n"]
        value, error = (float(part) for part in text.split("±"))
        # what is shown is rounded to the second digit of the error
        assert abs(value - entry["value"]) <= 0.05 * entry["stderr"] + 1e-12
        assert error == pytest.approx(entry["stderr"], rel=0.05)
        seen.add((model, key))
    assert len(seen) == 3 * 8
    shown = parsed.text
    for number in ("0.613", "0.0211", "29.1×", "35"):
        assert number in shown


def test_the_warning_of_an_estimate_stands_below_the_table(tmp_path: Path, built: tuple[str, Page]) -> None:
    assert "abbr" not in [tag for tag, _ in built[1].tags]
    metrics = demo_metrics()
    metrics["student"]["recall"]["warning"] = "about 9 of 800 samples carry it & more"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    _, parsed = page(tmp_path)
    cells = {(a["data-model"], a["data-metric"]): text for a, text in parsed.cells if "data-metric" in a}
    assert [where for where, text in cells.items() if "*" in text] == [("student", "recall")]
    assert "* Recall, student about 9 of 800 samples carry it & more" in " ".join(parsed.text.split())
    metrics["student"]["recall"]["warning"] = 3
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"student\.recall\.warning is broken"):
        build_report(tmp_path)


def test_page_is_whole_and_can_be_read_without_eyes(built: tuple[str, Page]) -> None:
    text, parsed = built
    ids = [a["id"] for a in parsed.having("id")]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:href="|url\()#([^")]+)', text):
        assert reference in ids
    assert all(a["alt"] for tag, a in parsed.tags if tag == "img")
    assert all(a["aria-label"] and a["role"] == "img" for tag, a in parsed.tags if tag == "svg")
    names = [tag for tag, _ in parsed.tags]
    assert names.count("h1") == 1
    assert names.count("h2") == 7
    assert names.count("table") == names.count("caption") == 3
    svgs = re.findall(r"<svg .*?</svg>", text, flags=re.S)
    assert len(svgs) == 8 + 3 + 2  # curves, the teacher's curves, weight and ratio
    for svg in svgs:
        ElementTree.fromstring(svg)  # well formed
        assert "#0101" not in svg
        assert "#000000" not in svg  # black would vanish in the dark
    light, dark = text.split("@media (prefers-color-scheme: dark)")[:2]
    for variable in set(re.findall(r"var\((--(?!s)[\w-]+)\)", text)) - {"--mono"}:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark


def test_all_parts_are_there(built: tuple[str, Page]) -> None:
    _, parsed = built
    assert "Not in this folder" not in parsed.text
    assert "finished at step 3,000" in parsed.text
    assert "Measured with classifier features, blocks of 800 samples, " in parsed.text
    assert "standard errors from 10 jackknife groups." in parsed.text  # the rest is as usual and not said
    assert "The run took 2 min" in parsed.text
    assert "method dmd2" in parsed.text  # the log knows better than the config what was resolved
    assert "ratio normalisation: a noise bin gathers 51.2 samples" in parsed.text
    assert "step 195" in parsed.text
    assert "distmatch distill --teacher runs/demo/teacher" in parsed.text
    assert 'divergence = "js"' in parsed.text
    assert "devices.0.torch_threads" in parsed.text
    assert "steps 5 to 750" in parsed.text


def test_same_folder_gives_the_same_page(demo: Path, built: tuple[str, Page]) -> None:
    assert page(demo)[0] == built[0]


def test_grids_show_the_same_labels_in_the_same_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "samples").mkdir()
    for model, classes in (("reference", [0, 1, 2, 3]), ("teacher", [3, 1, 0]), ("student", [1, 0, 3, 5])):
        labels = rng.permutation(np.repeat(classes, 3))
        x = np.broadcast_to(labels[:, None, None] * 20, (len(labels), 8, 8)).astype(np.uint8)
        np.savez(tmp_path / "samples" / f"{model}.npz", x=x, labels=labels)
    _, parsed = page(tmp_path)
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(str(a["src"]).split(",")[1]))))
        for a in parsed.having("src")
    ]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture[0::42, 0::42, 0].tolist() == [[20 * c] * 3 for c in (0, 1, 3)]
