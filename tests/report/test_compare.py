"""The page of a comparison: from its files alone, with every method, error, failure and picture."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distmatch.base.errors import UserError
from distmatch.report import build_report
from distmatch.report.compare_figures import _near
from distmatch.report.compare_words import sentence
from distmatch.report.table import METRICS

METHODS = {"dmd2": (0.30, 0.82), "f-distill:js": (0.10, 0.90), "sid": (0.12, 0.93)}


def entry(value: float | None, stderr: float | None = 0.01) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": 50}


def block(fd: float, recall: float, nfe: int = 1) -> dict[str, Any]:
    values = {"fd": entry(fd), "precision": entry(1 - fd), "recall": entry(recall), "vendi": entry(9.0)}
    return {"nfe": nfe, "seconds_per_1000": 0.02, **values}


def gap(name: str, metric: str, value: float, verdict: str) -> dict[str, Any]:
    rest = {"z": value / 0.01, "p": 0.001, "p_adjusted": 0.0005, "seeds": 2, "verdict": verdict}
    return {"name": name, "metric": metric, "value": value, "stderr": 0.01, **rest}


def record() -> dict[str, Any]:
    methods = [
        {
            **{
                "name": name,
                "method": name.split(":")[0],
                "divergence": None,
                "settings": {},
                "folder": name[:3],
            },
            **{
                "summary": "",
                "citation": "",
                "steps": 1200,
                "seconds_per_step": 0.01,
                "calls_per_step": 3.6,
                "seconds_once": 3.0,
            },
            **{
                "forward_per_step": {"student": 1.0, "teacher": 0.2},
                "backward_per_step": {"student": 0.2, "teacher": 0},
            },
            **{"parameters": {"student": 5000, "teacher": 5000}, "memory_mib": 1.0},
        }
        for name in METHODS
    ]
    runs = [
        {
            **{"name": name, "seed": seed, "folder": f"runs/{name[:3]}-seed{seed}", "status": "done"},
            **{"seconds": 12.0, "memory": 50 * 2**20, "metrics": block(fd, recall)},
        }
        for seed in range(2)
        for name, (fd, recall) in METHODS.items()
    ]
    runs[3] |= {"status": "failed", "message": "training went wrong: <loss> became nan"}
    cost = {"runs": 2, "seconds": 12.0, "seconds_per_step": 0.01, "memory": 50 * 2**20, "nfe": 1}
    return {
        "verb": "compare",
        "teacher_name": "runs/teacher",
        "data": "digits",
        "budget": {"text": "5m", "amount": 300.0, "unit": "seconds"},
        "evaluation": {"features": "classifier", "n": 50},
        "methods": methods,
        "impossible": [{"name": "rcm", "reason": "the teacher lends no gradient"}],
        "runs": runs,
        "reference": block(0.02, 0.95, 0),
        "teacher": block(0.05, 0.94, 35),
        "summary": {
            "means": {
                name: {k: v for k, v in block(*m).items() if isinstance(v, dict)}
                for name, m in METHODS.items()
            },
            "baseline": "f-distill:js",
            "differences": [
                gap("dmd2", "fd", 0.2, "worse"),
                gap("sid", "fd", 0.02, "within error"),
                gap("dmd2", "recall", -0.08, "worse"),
                gap("sid", "recall", 0.03, "better"),
            ],
            "fronts": [{"quality": "fd", "diversity": "recall", "methods": ["f-distill:js", "sid"]}],
            "costs": {name: {**cost, "seconds_per_1000": 0.02} for name in METHODS},
        },
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(content))
    return folder


def samples(folder: Path, content: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    places = [folder / "samples/reference.npz", folder / "samples/teacher.npz"]
    places += [folder / run["folder"] / "samples/student.npz" for run in content["runs"]]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez(place, x=rng.integers(0, 255, (40, 8, 8), dtype=np.uint8), labels=np.arange(40) % 5)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", page, flags=re.S)))


def test_a_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    content = record()
    folder = write(tmp_path / "cmp", content)
    samples(folder, content)
    page = build_report(folder).read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    text = text_of(page)
    for name, (fd, recall) in METHODS.items():
        assert f'data-method="{name}" data-metric="fd" data-value="{fd}"' in page
        assert f'data-method="{name}" data-metric="recall" data-value="{recall}"' in page
    for part in ("5 of 6 finished, 1 failed", "Differences from f-distill:js", "0.200 ± 0.010 worse"):
        assert part in text
    assert "dmd2, seed 1 training went wrong: &lt;loss&gt; became nan" in text
    assert "rcm, left out the teacher lends no gradient" in text
    assert "On the front: f-distill:js, sid" in text
    assert "1 of 2 seeds" in text
    assert page.count("<img") == 5  # real, teacher, three methods
    titles = re.findall(r'<figcaption class="title">([^<]+)</figcaption>', page)
    assert titles[-5:] == ["Real", "Teacher", "dmd2", "f-distill:js", "sid"]
    assert "student 1 + 0.2" in text
    assert "50 MiB" in text
    assert "12 s 3 s of it once" in text


def test_two_groups_of_methods_are_all_shown() -> None:
    """Frechet distances of four near the real data and three at twice theirs; one that is lost."""
    found = [0.085, 0.085, 0.0866, 0.087, 0.156, 0.18, 0.186]
    assert _near(found).all()
    assert _near([*found, 14.0, math.inf, math.nan]).tolist() == [True] * 7 + [False] * 3
    assert _near([1.0, 1.0, 1.0]).all()


def test_a_method_far_from_all_others_does_not_press_them_together(tmp_path: Path) -> None:
    content = record()
    means = content["summary"]["means"]
    for i in range(5):
        name = f"more{i}"
        content["methods"].append({**content["methods"][0], "name": name})
        content["summary"]["costs"][name] = content["summary"]["costs"]["sid"]
        means[name] = {**means["sid"], "fd": entry(0.1 + 0.02 * i), "recall": entry(0.85 + 0.01 * i)}
    content["summary"]["fronts"][0]["methods"] = ["sid"]
    plain = build_report(write(tmp_path / "a", content)).read_text()
    means["more4"] |= {"fd": entry(14.0), "recall": entry(0.02)}
    page = build_report(write(tmp_path / "b", content)).read_text()

    def apart(page: str) -> float:
        """Pixels from the first of the others, at a recall of 0.85, to real data at 0.95."""
        left, right = (
            re.search(rf'<text[^>]*?x="([\d.]+)"[^>]*>{text}<', page) for text in ("4", "Real data")
        )
        assert left is not None
        assert right is not None
        return float(right[1]) - float(left[1])

    assert apart(page) > 0.7 * apart(plain) > 100
    assert ">8 (0.02, 14)</text>" in page  # the one far off is still there, with its values


def test_a_value_that_is_not_known_takes_no_other_off_the_plot(tmp_path: Path) -> None:
    content = record()
    content["summary"]["means"]["sid"] |= {"fd": entry(None)}
    page = build_report(write(tmp_path / "c", content)).read_text()
    assert ">Real data</text>" in page


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    page = build_report(write(tmp_path, record())).read_text()
    cells = re.findall(r'data-method="([^"]+)" data-metric="(\w+)"[^>]*>\s*<b class="verdict better">', page)
    assert set(cells) == {("f-distill:js", "fd"), ("f-distill:js", "precision"), ("sid", "recall")}


def test_the_sentence_says_what_the_errors_allow() -> None:
    metrics = [m for m in METRICS if m.key in ("fd", "recall")]
    content = record()
    assert "f-distill:js has the lowest Fréchet distance, 0.100 ± 0.010" in sentence(content, metrics)
    assert "Of 2 compared with f-distill:js, 1 is worse by more than the error." in sentence(content, metrics)
    content["summary"]["differences"][1]["verdict"] = "worse"
    assert "All 2 others are worse by more than the error." in sentence(content, metrics)
    for difference in content["summary"]["differences"]:
        difference["verdict"] = "within error"
    assert "No difference from f-distill:js exceeds" in sentence(content, metrics)
    content["summary"]["baseline"] = "dmd2"
    assert "No difference from dmd2 exceeds" in sentence(content, metrics)
    for difference in content["summary"]["differences"]:
        difference["verdict"] = "not known"
    assert "its significance is unknown" in sentence(content, metrics)
    content["summary"] |= {"means": {}, "baseline": "", "differences": []}
    assert sentence(content, metrics) == "No run has been finished and measured yet."


def test_a_comparison_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    content = record()
    content["runs"] = [
        {k: run[k] for k in ("name", "seed", "folder")} | {"status": "pending"} for run in content["runs"]
    ]
    nothing = dict.fromkeys(content["summary"]["costs"]["sid"], None) | {"runs": 0}
    content["summary"] = {
        **{"means": {}, "baseline": "", "differences": [], "fronts": []},
        "costs": dict.fromkeys(METHODS, nothing),
    }
    text = text_of(build_report(write(tmp_path, content)).read_text())
    assert "0 of 6 finished, 6 not yet run" in text
    assert "No run has been finished" in text
    assert "No samples have been saved" in text


def test_numbers_that_are_not_known_do_not_break_the_page(tmp_path: Path) -> None:
    content = record()
    content["summary"]["means"]["sid"]["fd"] = entry(None, None)
    content["summary"]["differences"][1] |= {
        "value": None,
        "stderr": None,
        "p_adjusted": None,
        "verdict": "not known",
    }
    text = text_of(build_report(write(tmp_path, content)).read_text())
    assert "not finite" in text


def test_a_broken_record_is_refused(tmp_path: Path) -> None:
    content = record()
    del content["summary"]
    with pytest.raises(UserError, match=r"compare\.json is broken"):
        build_report(write(tmp_path, content))
