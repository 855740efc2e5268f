"""`distmatch sample`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.parse import parse, print_json

if TYPE_CHECKING:
    from distmatch.training.sampling import Sampling

ABOUT = """Draw samples from a student or a teacher.

example: distmatch sample runs/demo --n 64 --out samples.png
         distmatch sample runs/teacher --n 1000 --classes 3 --guidance 2 --out threes.npz
         distmatch sample runs/teacher --solver dpmpp-2m --steps 10 --out fast.png"""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Everything `distmatch sample` can be told."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a model folder, a folder of diffusers, a .pkl of EDM, or ring8, grid25, skewed2."""
    n: int = 64
    """Number of samples."""
    out: Path = Path("samples.npz")
    """.npz (x and labels), .png (a grid), or a folder (one file per image)."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn; none draws all evenly."""
    solver: str = "heun"
    """How a teacher is sampled: heun, dpmpp-2m, tab:3, ipndm:3, ddim:1, ...; docs/solvers.md lists them."""
    steps: int = 18
    """Steps of a teacher's solver; 18 of Heun's are 35 network calls, 18 of a multistep solver's are 18."""
    grid: Literal["karras", "log", "uniform", "power", "log-snr", "time"] = "karras"
    """How the noise levels lie."""
    path: str = ""
    """Noise path for what works in its time (tab, grids power and time), vp:beta_max=12 too; empty: the
    teacher's own, or vp."""
    guidance: float = 1.0
    """Guidance scale of a teacher; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where LOW < sigma <= HIGH."""
    guidance_reference: str = ""
    """A weaker teacher to guide by (autoguidance); empty guides by the teacher without its class."""
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

    from distmatch.cli.output import check_form, tell_conversion, write_samples
    from distmatch.training.assess import HEUN
    from distmatch.training.models import open_model, refuse_existing

    refuse_existing(o.out, o.overwrite)
    model = open_model(o.model)
    tell_conversion(o.model, model.conversion)
    if model.teacher is None:
        _refuse_for_students(o)
        sampling = HEUN
    else:
        sampling = _sampling(o)
        sampling.check(model.teacher)
    check_form(o.out, images=len(model.shape) > 1, overwrite=o.overwrite)
    labels = None
    if o.classes:
        labels = torch.tensor(o.classes).repeat(-(-o.n // len(o.classes)))[: o.n]
    drawn = model.draw(o.n, labels, o.seed, sampling, batch=o.batch, device=o.device)
    write_samples(o.out, model.scaling.export(drawn.x), drawn.labels, o.overwrite)
    result = {
        "out": str(o.out),
        "n": o.n,
        "model": model.kind,
        "solver": None if model.kind == "student" else o.solver,
        "nfe": drawn.nfe,
        "seconds_per_1000": round(drawn.seconds_per_1000, 5),
    }
    if o.json:
        print_json(result)
    else:
        print(f"{o.n} samples in {o.out} ({model.kind}, {drawn.nfe} network calls each)")


def _refuse_for_students(o: SampleOptions) -> None:
    """A student has no use for the options of a solver.

    Raises:
        UserError: One of them was given.
    """
    names = ("solver", "steps", "grid", "path", "guidance", "guidance_interval", "guidance_reference")
    defaults = {f.name: f.default for f in fields(SampleOptions)}
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(o, name) != defaults[name]]
    if given:
        raise UserError(
            "a student has its calls and its guidance built in: there is no path to solve",
            got=", ".join(given),
            fix="leave them out, or distil with --calls and --guidance; solvers are for teachers",
        )


def _sampling(o: SampleOptions) -> Sampling:
    """The options as the settings of a teacher's sampling."""
    from distmatch.training.sampling import Sampling
    from distmatch.training.teachers import load_teacher

    return Sampling(
        solver=o.solver,
        steps=o.steps,
        grid=o.grid,
        path=o.path,
        guidance=o.guidance,
        interval=o.guidance_interval,
        reference=load_teacher(o.guidance_reference) if o.guidance_reference else None,
    )
