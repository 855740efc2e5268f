"""`distmatch demo`: the whole main job on scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from distmatch.base.errors import UserError
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import Place, options_from, parse
from distmatch.methods.matching.settings import FDistillSettings
from distmatch.training.options import DistillOptions, RunOptions, TeacherConfig, TrainOptions

HELP = Help(
    """Train a teacher on digits, distil it into a one-step student, measure both, write a report.

example: distmatch demo
         distmatch demo --fast --out runs/try"""
)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `distmatch demo`."""

    out: Path = Path("runs/demo")
    """The run folder: the student's, with the teacher's inside as teacher/."""
    fast: bool = False
    """Use fewer steps: under a minute, worse samples."""
    divergence: str = "js"
    """Divergence of the distillation."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    resume: bool = False
    """Continue an interrupted demo in --out."""
    overwrite: bool = False
    """Replace an existing --out."""
    json: bool = False
    """Print one JSON object on stdout."""


def recipe(options: DemoOptions) -> tuple[TrainOptions, DistillOptions]:
    """The demo's two runs."""
    teacher_steps, student_steps = (500, 400) if options.fast else (3000, 3000)
    run = RunOptions(seed=options.seed, device=options.device, batch=256)
    train = TrainOptions(
        data="digits",
        run=replace(run, steps=teacher_steps, checkpoint_every=500),
        teacher=TeacherConfig(),
    )
    distill = DistillOptions(
        data="digits",
        teacher=str(options.out / "teacher"),
        divergence=options.divergence,
        run=replace(run, steps=student_steps, checkpoint_every=500),
        # Digits have 17 grey values: below sigma 0.1 this alone distinguishes real from generated. Sigmas
        # are in units of sigma_data, 0.75.
        settings=FDistillSettings(noise_low=0.13, noise_high=6.6, gan_weight=3e-2, lr_decay="cosine"),
    )
    return train, distill


def run(argv: list[str]) -> None:
    """Parses, runs the demo, prints the table and the path of the report."""
    options = parse(DemoOptions, argv, verb="demo", said=HELP)
    import numpy as np

    from distmatch.cli.running import check_place, going_on, open_folder, run_or_resume
    from distmatch.cli.table import metric_table
    from distmatch.data import load_data
    from distmatch.metrics import resolve_features
    from distmatch.report import build_report, save_grid
    from distmatch.training.devices import pick_device
    from distmatch.training.evaluation import evaluate_models, plain
    from distmatch.training.models import open_model
    from distmatch.training.prepare import prepare_distillation
    from distmatch.training.prepare_teacher import prepare_training

    train, distill = recipe(options)
    if options.resume:
        _same_demo(options, distill)
    place = Place(out=options.out, resume="latest" if options.resume else None, overwrite=options.overwrite)
    # Impossible options are refused before anything is trained.
    check_place(place)
    pick_device(options.device)
    prepare_distillation(replace(distill, teacher="ring8", data="ring8"), fresh=False)
    again = [option for option in argv if option not in ("--resume", "--overwrite")]
    with open_folder(place) as folder, going_on("demo", place, again):
        inner = replace(place, out=options.out / "teacher", overwrite=False)
        run_or_resume(lambda _: prepare_training(train), inner)
        run_or_resume(lambda fresh: prepare_distillation(distill, fresh=fresh), place, folder)
        models = {
            "teacher": open_model(str(options.out / "teacher")),
            "student": open_model(str(options.out)),
        }
        data = load_data("digits")
        space = resolve_features("auto", data)
        metrics = evaluate_models(
            data, models, folder, features=space, seed=options.seed, device=options.device, spec="digits"
        )
        for name in ("reference", "teacher", "student"):
            with np.load(folder.samples / f"{name}.npz", allow_pickle=False) as file:
                by_class = np.argsort(file["labels"][:100], kind="stable")
                save_grid(folder.samples / f"{name}.png", file["x"][by_class], 10)
        report = build_report(folder.path)
    if options.json:
        print_json({"run": str(folder.path), "report": str(report), "metrics": plain(metrics)})
        return
    print(metric_table(metrics, space.description))
    print(f"report: {report}")


def _same_demo(options: DemoOptions, distill: DistillOptions) -> None:
    """Refuses to continue a demo that was started with other options."""
    config = options.out / "config.toml"
    if config.exists():
        begun = options_from(DistillOptions, config, "distill")
        if begun != distill:
            raise UserError(
                f"the demo in {options.out} was started with other options",
                got=f"--seed {begun.run.seed} --divergence {begun.divergence}, {begun.run.steps} steps",
                fix="use the same options, or start again with --overwrite",
            )
