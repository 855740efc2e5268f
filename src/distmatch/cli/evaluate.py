"""`distmatch evaluate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.parse import parse, print_json

ABOUT = """Measure samples, or the models of a run folder, against real data.

example: distmatch evaluate runs/js
         distmatch evaluate samples.npz --data digits
         distmatch evaluate samples.npz --data real.npz --features pixels --json"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Everything `distmatch evaluate` can be told."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """A sample file or folder of images, or a run folder (whose metrics.json is then written)."""
    data: str = ""
    """The real data; empty takes those of the run."""
    teacher: str = ""
    """For a student's run: the teacher to stand beside it; empty takes the one it was distilled from."""
    features: str = "auto"
    """classifier, pixels, or auto: classifier where there are labels."""
    n: int | None = None
    """Samples in a block, the same for all; unset takes half the data, at most 5000."""
    solver: str = "heun"
    """How the teacher is sampled; docs/solvers.md lists the names."""
    steps: int = 18
    """Steps of the teacher's solver; 18 of Heun's are 35 network calls."""
    grid: Literal["karras", "log", "uniform", "power", "log-snr", "time"] = "karras"
    """How the noise levels of the teacher lie."""
    guidance: float = 1.0
    """Guidance scale of the teacher; 1 is none."""
    seed: int = 0
    """Seed of latents, labels and blocks."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, measures, prints the table."""
    o = parse(EvaluateOptions, argv, verb="evaluate", about=ABOUT)
    if o.n is not None and o.n < 1:
        raise UserError("--n must be at least 1", got=o.n)
    from distmatch.training.teachers import is_from_elsewhere

    folder = Path(o.what)
    if not folder.exists():
        raise UserError(
            f"{o.what} does not exist",
            expected="a sample file, a folder of images or a run folder",
            fix="check the path",
        )
    if (folder / "model.safetensors").exists() or is_from_elsewhere(folder):
        raise UserError(
            f"{o.what} is a model folder, or a model from elsewhere",
            expected="samples, or a run folder, which gets the metrics.json",
            fix=f"draw samples first: distmatch sample {o.what} --n 5000 --out samples.npz",
        )
    is_run = (folder / "model").is_dir() or (folder / "config.toml").exists()
    metrics = _run_folder(o) if is_run else _sample_file(o)
    from distmatch.cli.table import metric_table
    from distmatch.training.assess import plain

    if o.json:
        print_json(plain(metrics))
    else:
        print(metric_table(metrics))


def _sample_file(o: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """Metrics of a sample file, with the floor of the reference."""
    import torch

    from distmatch.data import TOY_NAMES, load_data, toy
    from distmatch.metrics import evaluate, plan, reference_floor

    if not o.data:
        raise UserError(
            "no real data to measure against", expected="--data, for example --data digits", fix="pass --data"
        )
    real = load_data(o.data)
    given = load_data(o.what)
    if given.kind != real.kind or given.shape != real.shape:
        raise UserError(
            "the samples have another shape than the real data",
            got=f"{given.kind}s {given.shape}",
            expected=f"{real.kind}s {real.shape}",
        )
    if real.kind == "vector":  # vectors are measured in the units of the real data, not in their own
        x = real.scaling.to_model(given.raw)
    else:
        x, _ = given.batch(torch.arange(len(given)))
    labels = given.labels if real.labels is not None else None
    mixture = toy(o.data) if o.data in TOY_NAMES else None
    settings = plan(real, len(given), features=o.features, n=o.n, seed=o.seed)
    common: dict[str, Any] = {"features": o.features, "n": settings.n, "seed": o.seed, "mixture": mixture}
    floor = reference_floor(real, stratified=labels is not None, **common)
    return {"reference": floor, "samples": evaluate(x, real, labels=labels, **common)}


def _run_folder(o: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """Metrics of a run's models; written to the run folder too."""
    from distmatch.cli.output import tell_conversion
    from distmatch.data import load_data
    from distmatch.training.evaluation import evaluate_models
    from distmatch.training.models import open_model
    from distmatch.training.runfolder import RunFolder
    from distmatch.training.sampling import Sampling

    model = open_model(o.what)
    tell_conversion(o.what, model.conversion)
    spec = o.data or model.data
    if not spec:
        raise UserError(f"{o.what} does not say what it was trained on", fix="pass --data")
    data = load_data(spec, labels=model.num_classes > 0)
    models = {model.kind: model}
    teacher = o.teacher or (str(model.student.info.get("teacher", "")) if model.student else "")
    if model.student is not None and teacher:
        try:
            models = {"teacher": open_model(teacher), **models}
            tell_conversion(teacher, models["teacher"].conversion)
        except UserError as error:
            if o.teacher:
                raise
            print(f"warning: measured without the teacher: {error}", file=sys.stderr)
    return evaluate_models(
        data,
        models,
        RunFolder(Path(o.what)),
        features=o.features,
        n=o.n,
        sampling=Sampling(solver=o.solver, steps=o.steps, grid=o.grid, guidance=o.guidance),
        seed=o.seed,
        device=o.device,
        spec=spec,
    )
