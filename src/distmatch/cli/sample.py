"""`distmatch sample`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.parse import parse, print_json

ABOUT = """Draw samples from a student or a teacher.

example: distmatch sample runs/demo --n 64 --out samples.png
         distmatch sample runs/teacher --n 1000 --steps 18 --classes 3 --out threes.npz"""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Everything `distmatch sample` can be told."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a model folder, or ring8, grid25, skewed2."""
    n: int = 64
    """Number of samples."""
    out: Path = Path("samples.npz")
    """.npz (x and labels), .png (a grid), or a folder (one file per image)."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn; none draws all evenly."""
    steps: int = 18
    """Heun steps of a teacher; network calls are twice that, less one."""
    guidance: float = 1.0
    """Classifier-free guidance scale of a teacher; 1 is none."""
    seed: int = 0
    """Seed of the latents and labels."""
    batch: int = 1024
    """Samples at a time."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    overwrite: bool = False
    """Replace --out if it exists."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, samples, writes."""
    o = parse(SampleOptions, argv, verb="sample", about=ABOUT)
    if o.n < 1 or o.batch < 1:
        raise UserError("--n and --batch must be at least 1", got=f"{o.n} and {o.batch}")
    if not math.isfinite(o.guidance):
        raise UserError("--guidance must be finite", got=o.guidance)
    import torch

    from distmatch.cli.output import check_form, write_samples
    from distmatch.training.models import open_model, refuse_existing

    refuse_existing(o.out, o.overwrite)
    model = open_model(o.model)
    if model.kind == "student" and (o.guidance != 1 or o.steps != 18):
        raise UserError(
            "a student has its calls and its guidance built in",
            got=f"--steps {o.steps} --guidance {o.guidance}",
            fix="leave them out, or distil with --calls and --guidance",
        )
    check_form(o.out, images=len(model.shape) > 1, overwrite=o.overwrite)
    labels = None
    if o.classes:
        labels = torch.tensor(o.classes).repeat(-(-o.n // len(o.classes)))[: o.n]
    drawn = model.draw(
        o.n, labels, o.seed, steps=o.steps, guidance=o.guidance, batch=o.batch, device=o.device
    )
    write_samples(o.out, model.scaling.export(drawn.x), drawn.labels, o.overwrite)
    result = {
        "out": str(o.out),
        "n": o.n,
        "model": model.kind,
        "nfe": drawn.nfe,
        "seconds_per_1000": round(drawn.seconds_per_1000, 5),
    }
    if o.json:
        print_json(result)
    else:
        print(f"{o.n} samples in {o.out} ({model.kind}, {drawn.nfe} network calls each)")
