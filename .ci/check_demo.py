"""Checks the run folder of `distmatch demo --fast`: the files, the keys of metrics.json, and sane figures."""

import json
import sys
from pathlib import Path

METRICS = ("fd", "kid", "precision", "recall", "density", "coverage", "vendi", "label_accuracy")
FILES = ("config.toml", "env.json", "log.jsonl", "metrics.json", "report.html", "model/model.safetensors")

run = Path(sys.argv[1])
problems = [f"{name} is missing" for name in FILES if not (run / name).is_file()]
metrics = json.loads((run / "metrics.json").read_text())
if list(metrics) != ["reference", "teacher", "student"]:
    problems.append(f"metrics.json has the models {list(metrics)}")
for model, values in metrics.items():
    for key in METRICS:
        estimate = values.get(key)
        if not isinstance(estimate, dict) or set(estimate) != {"value", "stderr", "n"}:
            problems.append(f"{model}.{key} is not an estimate: {estimate}")
        elif estimate["value"] is None or estimate["n"] < 1:
            problems.append(f"{model}.{key} has no value: {estimate}")
    for key in ("nfe", "seconds_per_1000"):
        if not isinstance(values.get(key), (int, float)):
            problems.append(f"{model}.{key} is not a number: {values.get(key)}")
if metrics["teacher"]["nfe"] != 35 or metrics["student"]["nfe"] != 1:
    problems.append(f"calls are {metrics['teacher']['nfe']} and {metrics['student']['nfe']}, not 35 and 1")
# A few hundred steps make poor digits, but recognisable ones; chance would be 0.1.
if not metrics["student"]["label_accuracy"]["value"] > 0.8:
    problems.append(f"the student's labels are wrong: {metrics['student']['label_accuracy']}")
print("\n".join(problems) or "metrics.json and the run folder are as they should be")
sys.exit(1 if problems else 0)
