"""Run folders that reports are built on, made here, and their pages read back."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

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
    message = "ratio normalization: a noise bin gathers 51.2 samples at batch 256; its mean is pooled."
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
