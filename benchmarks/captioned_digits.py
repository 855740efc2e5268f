"""Text to image from beginning to end: a teacher of captioned digits, its students, what their prompts give.

    python benchmarks/captioned_digits.py --out runs/captions --docs docs/text-to-image.md

Trains the teacher of `recipes/captioned_digits.toml` and students by `recipes/distill_captioned_digits.toml`,
each in a process of its own; a model that is there already is not trained again. Then every model draws one
picture for each of `--prompts` captions of the test data, which are compared with what a judge sees in them,
and `--seeds` pictures for each of `--diverse` captions, which are compared with each other. The judge learned
from real pictures of the training digits; its reading of real pictures of the test digits is the first row.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
import tyro
from matplotlib import pyplot as plt
from sections import replace_section
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.data import load_data
from distmatch.metrics.agreement import Judge, prompt_diversity, train_judge
from distmatch.training.models import open_model
from distmatch.training.sampling import Sampling

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train and to measure."""

    out: Path = Path("runs/captions")
    """A folder for the models and `results.json`."""
    divergences: tuple[str, ...] = ("reverse_kl", "js", "kl")
    """Of the students."""
    num_steps: tuple[int, ...] = (1, 4)
    """Steps of the students."""
    guidance: float = 2.0
    """Of the teacher, as in the recipe of the students."""
    prompts: int = 1000
    """Captions for the agreement, one picture each."""
    diverse: int = 64
    """Captions for the diversity."""
    seeds: int = 32
    """Pictures of each of them."""
    judge_steps: int = 800
    """Training steps of the judge."""
    seed: int = 1
    """Of all samples."""
    train: tuple[str, ...] = ()
    """Further arguments of `distmatch train`, as one word: --train=--steps=100."""
    distill: tuple[str, ...] = ()
    """Further arguments of `distmatch distill`."""
    docs: Path | None = None
    """A page whose section of results is replaced, with a picture beside it."""


def distmatch(words: Sequence[str]) -> None:
    """Runs a command in a process of its own."""
    subprocess.run([sys.executable, "-m", "distmatch", *words], check=True)


def trained(folder: Path, verb: str, arguments: Sequence[str]) -> dict[str, float]:
    """Processor and wall-clock minutes of a run, which is carried out if its model is not there yet."""
    times = folder.with_suffix(".json")
    if not (folder / "model" / "config.json").is_file() or not times.is_file():
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        distmatch([verb, *arguments, "--out", str(folder), "--overwrite"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.write_text(json.dumps({"processor": cpu / 60, "elapsed": (time.perf_counter() - began) / 60}))
    found: dict[str, float] = json.loads(times.read_text())
    return found


@dataclass(frozen=True)
class Row:
    """One model, measured.

    Attributes:
        name: What it is.
        calls: Network calls for a picture; a guided teacher makes two for each evaluation.
        agreement: As :meth:`Judge.agreement`.
        diversity: As :func:`prompt_diversity`; none of the judge's row.
        minutes: Processor and wall-clock minutes of training.
    """

    name: str
    calls: int
    agreement: dict[str, Estimate]
    diversity: dict[str, Estimate]
    minutes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Its JSON form."""
        values = {name: estimate.to_dict() for name, estimate in {**self.agreement, **self.diversity}.items()}
        return {"name": self.name, "calls": self.calls, "minutes": self.minutes, **values}

    def line(self, of: float) -> str:
        """A row of the table; ``of`` is the agreement that its own is divided by."""
        shown = [self.agreement[key] for key in ("digit", "color", "layout", "mean")]
        cells = [f"{e.value:.3f} ± {e.stderr:.3f}" for e in shown]
        cells += [f"{self.agreement['mean'].value / of:.3f}"]
        cells += [f"{e.value:.2f} ± {e.stderr:.2f}" for e in self.diversity.values()] or ["", ""]
        cells += [f"{self.minutes['processor']:.1f}" if self.minutes else ""]
        return f"| {self.name} | {self.calls or ''} | {' | '.join(cells)} |"


def measured(
    o: Options, judge: Judge, name: str, folder: Path, guidance: float, minutes: dict[str, float]
) -> tuple[Row, Tensor]:
    """A model's row, and its pictures (diverse, seeds, 3, 8, 16) in model space."""
    model, held_out = open_model(str(folder)), load_data("captioned-digits:test")
    encoder, sampling = held_out.prompt_encoder, Sampling(guidance=guidance)
    captions = held_out.captions[: o.prompts]
    one = model.draw(len(captions), encoder.encode(captions), o.seed, sampling)
    repeated = [caption for caption in held_out.captions[: o.diverse] for _ in range(o.seeds)]
    many = model.draw(len(repeated), encoder.encode(repeated), o.seed + 1, sampling)
    pictures = many.x.unflatten(0, (o.diverse, o.seeds))
    row = Row(name, one.nfe, judge.agreement(one.x, captions), prompt_diversity(pictures), minutes)
    print(row.line(1.0), flush=True)
    return row, pictures


def results(o: Options) -> tuple[list[Row], dict[str, Tensor]]:
    """The rows of judge, teacher and students, and the pictures of each model."""
    o.out.mkdir(parents=True, exist_ok=True)
    judge, held_out = train_judge(steps=o.judge_steps), load_data("captioned-digits:test")
    real = judge.agreement(held_out.scaling.to_model(held_out.raw), held_out.captions)
    rows, pictures = [Row("real pictures", 0, real, {}, {})], {}
    teacher = o.out / "teacher"
    minutes = trained(teacher, "train", ["--config", str(RECIPES / "captioned_digits.toml"), *o.train])
    for name, guidance in (("teacher", 1.0), (f"teacher, guidance {o.guidance:g}", o.guidance)):
        row, pictures[name] = measured(o, judge, name, teacher, guidance, minutes)
        rows.append(row)
        minutes = {}
    recipe = str(RECIPES / "distill_captioned_digits.toml")
    for steps in o.num_steps:
        for divergence in o.divergences:
            folder = o.out / f"{divergence}-{steps}"
            wanted = ["--divergence", divergence, "--num-steps", str(steps), "--guidance", str(o.guidance)]
            wanted += ["--steps", "200"] if steps > 1 else []  # they start nearer to the teacher
            arguments = ["--config", recipe, "--teacher", str(teacher), *wanted, *o.distill]
            minutes = trained(folder, "distill", arguments)
            name = f"{divergence}, {steps} step{'s' * (steps > 1)}"
            row, pictures[name] = measured(o, judge, name, folder, 1.0, minutes)
            rows.append(row)
    return rows, pictures


def table(o: Options, rows: Sequence[Row]) -> str:
    """The section of the page."""
    judge, guided = rows[0].agreement["mean"].value, rows[2].agreement["mean"].value
    lines = [
        "| | calls | digit | color | layout | mean | relative | Vendi | distance | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row.line(judge if i < 3 else guided) for i, row in enumerate(rows)),
    ]
    return "\n".join(lines)


def picture(pictures: dict[str, Tensor], captions: Sequence[str], file: Path) -> None:
    """Prompts in rows, and some seeds of each side by side, for each model."""
    n = min(SHOWN_PROMPTS, *(len(x) for x in pictures.values()))
    columns = -(-len(pictures) // 2)
    size = (2.3 * columns + 1.6, 0.64 * n + 1.0)
    figure, axes = plt.subplots(2, columns, figsize=size, squeeze=False)
    edges = ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1))
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (axis, (name, x)) in enumerate(zip(axes.flat, pictures.items(), strict=False)):
        shown = np.pad(x[:n, :SHOWN_SEEDS].clamp(-1, 1).numpy(), edges, constant_values=0.6)
        tiles = np.concatenate(np.concatenate(list(np.moveaxis(shown, 1, 0)), axis=-1), axis=-2)
        axis.set_axis_on()
        axis.imshow(np.moveaxis((tiles + 1) / 2, 0, -1), interpolation="nearest")
        axis.set_title(name, fontsize=8)
        height = shown.shape[-2]
        places = [height * (row + 0.5) - 0.5 for row in range(n)] if i % columns == 0 else []
        axis.set(xticks=[], yticks=places)
        axis.set_yticklabels(captions[: len(places)], fontsize=7)
        axis.tick_params(length=0)
    figure.tight_layout(pad=0.4)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main(o: Options) -> None:
    """Trains, measures, prints."""
    rows, pictures = results(o)
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = {**machine, "rows": [row.to_dict() for row in rows]}
    (o.out / "results.json").write_text(json.dumps(found, indent=1))
    captions = load_data("captioned-digits:test").captions
    picture(pictures, captions, o.out / "pictures.png")
    text = table(o, rows)
    print(text)
    if o.docs is not None:
        replace_section(o.docs, "results", text)
        picture(pictures, captions, o.docs.parent / "pictures" / "captioned-digits.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
