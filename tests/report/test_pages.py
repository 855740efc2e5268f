"""The report page: built on run folders that are made here, checked against the files it was made from."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.report import build_report
from tests.helpers.report_runs import (
    Page,
    demo_metrics,
    make_run,
    page,
)


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
    assert "ratio normalization: a noise bin gathers 51.2 samples" in parsed.text
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
