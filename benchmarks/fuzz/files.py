"""Hands changed files of a run to their readers: config.toml, log.jsonl, state.json, metrics.json, the page.

python benchmarks/fuzz/files.py --cases 200000 --seconds 480 --save failures
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from harness import Case, command_line, scratch
from values import changed_bytes, changed_value, hostile

from distmatch.cli.distill import _options_of
from distmatch.cli.parse import options_from
from distmatch.report import build_report
from distmatch.report.log import curves, read_log, scalar_keys, wall_seconds
from distmatch.report.run import read_metrics
from distmatch.training.checkpoint import load_checkpoint
from distmatch.training.comparison.options import CompareOptions
from distmatch.training.loop import restore
from distmatch.training.options import DistillOptions, NetOptions, RunOptions, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from distmatch.training.runfolder import RunFolder
from distmatch.training.runs import carry_out
from distmatch.training.toml import dataclass_to_dict, to_toml

KINDS = ("config", "config", "log", "log", "state", "state", "restore", "metrics", "metrics", "page")
KINDS_OF_CONFIG = {"train": TrainOptions, "distill": DistillOptions, "compare": CompareOptions}
PAGES = 200  # one page in so many cases: drawing takes a second


class Files:
    """Makes and checks the cases.

    Attributes:
        folder: A run of a tiny teacher, and places for the cases.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or scratch()
        options = TrainOptions(
            data="ring8",
            net=NetOptions(net="mlp", width=8, depth=1),
            run=RunOptions(steps=4, batch=8, checkpoint_every=2, log_every=1, device="cpu"),
        )
        self.run = RunFolder(self.folder / "run")
        carry_out(prepare_training(options), self.run)
        self.state = prepare_training(options).state
        self.checkpoint = self.run.checkpoints / "step-000004"
        self.tree = json.loads((self.checkpoint / "state.json").read_text())
        self.log = self.run.log.read_bytes()
        estimate = {"value": 0.5, "stderr": 0.1, "n": 100, "warning": "few"}
        block = {"fd": estimate, "precision": estimate, "nfe": 1, "seconds_per_1000": 0.5, "note": "x"}
        self.metrics = {name: block for name in ("reference", "teacher", "student")}
        self.configs = {
            verb: to_toml({"verb": verb, **dataclass_to_dict(kind())}).encode()
            for verb, kind in KINDS_OF_CONFIG.items()
        }

    def make(self, rng: random.Random, number: int) -> Case:
        """One file, its kind in the label."""
        kind = rng.choice(KINDS) if number % PAGES else "page"
        if kind == "page" and number % PAGES:
            kind = "log"
        if kind == "config":
            verb = rng.choice(list(self.configs))
            return Case(f"config {verb}", changed_bytes(rng, self.configs[verb]))
        if kind in ("log", "page"):
            return Case(kind, self._log(rng))
        if kind == "metrics":
            return Case(kind, self._json(rng, self.metrics))
        if kind == "state":
            return Case(kind, self._json(rng, self.tree))
        tree = dict(self.tree)
        tree["structure"] = changed_value(rng, tree["structure"], rng.randint(1, 3))
        return Case(kind, json.dumps(tree).encode())

    def _json(self, rng: random.Random, value: Any) -> bytes:
        if rng.random() < 0.5:
            return changed_bytes(rng, json.dumps(value).encode())
        return json.dumps(changed_value(rng, value, rng.randint(1, 3))).encode()

    def _log(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return changed_bytes(rng, self.log)
        lines = [json.loads(line) for line in self.log.splitlines()]
        at = rng.randrange(len(lines))
        lines[at] = changed_value(rng, lines[at], rng.randint(1, 3))
        if rng.random() < 0.3:
            lines.insert(
                at, {"event": rng.choice(("train", "resume", "end", "evaluate")), "step": hostile(rng)}
            )
        return "\n".join(json.dumps(line) for line in lines).encode()

    def check(self, case: Case) -> None:
        """Reads a case as what it is."""
        kind, _, verb = case.label.partition(" ")
        path = self.folder / f"case-{os.getpid()}"
        if kind in ("state", "restore"):
            self._check_checkpoint(kind, case.content, path)
            return
        if kind == "page":
            path.mkdir(exist_ok=True)
            (path / "log.jsonl").write_bytes(case.content)
            build_report(path)
            return
        path = path.with_suffix(".file")
        path.write_bytes(case.content)
        if kind == "config":
            defaults: Any = _options_of if verb == "distill" else None
            options_from(KINDS_OF_CONFIG[verb], path, verb, defaults=defaults)
        elif kind == "metrics":
            read_metrics(path)
        else:
            events = read_log(path)
            wall_seconds(events)
            for key in scalar_keys(events):
                curves(events, key)

    def _check_checkpoint(self, kind: str, content: bytes, path: Path) -> None:
        place = path / "checkpoints" / "step-000004"
        if not place.is_dir():
            shutil.copytree(self.checkpoint, place)
        if kind == "restore":  # a structure with the checksum that belongs to it
            tree = json.loads(content)
            text = json.dumps([tree["step"], tree["structure"]]).encode()
            content = json.dumps({**tree, "structure_sha256": hashlib.sha256(text).hexdigest()}).encode()
        (place / "state.json").write_bytes(content)
        if kind == "state":
            load_checkpoint(place)
            return
        restore(self.state, RunFolder(path), "latest")


def main() -> int:
    """Runs the cases that the command line asks for."""
    torch.set_num_threads(1)
    cases = Files()
    return command_line(__doc__ or "", cases.make, cases.check)


if __name__ == "__main__":
    sys.exit(main())
