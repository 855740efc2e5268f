"""The main job end to end, from a clean state: `distmatch demo --fast`, its files and its metrics."""

import json
import math
import subprocess
import sys
import time

METRICS = ("fd", "kid", "precision", "recall", "density", "coverage", "vendi", "label_accuracy")
FILES = ("config.toml", "env.json", "log.jsonl", "metrics.json", "report.html", "model/model.safetensors")


def test_the_fast_demo_from_a_clean_state(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "demo"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "distmatch", "demo", "--fast", "--out", str(run)], check=True)
    print(f"demo --fast took {time.perf_counter() - began:.0f} s")
    assert [name for name in FILES if not (run / name).is_file()] == []
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["reference", "teacher", "student"]
    for model, values in metrics.items():
        for key in METRICS:
            assert set(values[key]) == {"value", "stderr", "n", "features"}, (model, key)
            assert math.isfinite(values[key]["value"]), (model, key)
            assert values[key]["n"] > 0
    assert metrics["reference"]["seconds_per_1000"] is None  # real data are drawn by nobody
    assert all(metrics[model]["seconds_per_1000"] > 0 for model in ("teacher", "student"))
    assert metrics["teacher"]["nfe"] == 35
    assert metrics["student"]["nfe"] == 1
    # A few hundred steps make poor digits, but recognizable ones; chance would be 0.1.
    assert metrics["student"]["label_accuracy"]["value"] > 0.8
