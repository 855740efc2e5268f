"""`distmatch sample`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.imported import imported
from distmatch.cli.parse import parse
from distmatch.training.pipeline_options import PipelineOptions

if TYPE_CHECKING:
    from distmatch.diffusion.conditioning import Conditioning
    from distmatch.training.models import Model
    from distmatch.training.sampling import SampleResult, Sampling

HELP = Help(
    """Draw samples from a student or a teacher.

example: distmatch sample runs/demo --n 64 --out samples.png
         distmatch sample runs/teacher --n 1000 --classes 3 --guidance 2 --out threes.npz
         distmatch sample runs/teacher --solver dpmpp-2m --steps 10 --out fast.png
         distmatch sample runs/demo --hybrid-teacher runs/demo/teacher --out hybrid.png
         distmatch sample runs/student --prompt "a red cat" --prompt "a blue dog" --out images
         distmatch sample runs/student --conditions prompts.npz --out images.npz
         distmatch sample runs/teacher --trajectory decided.png
         distmatch sample runs/student --n 1000000 --out million.store""",
    short="model n out prompt prompts classes class_balance conditions clip solver steps guidance seed "
    "device overwrite json",
    groups={
        "How a teacher is sampled": "solver steps grid path guidance guidance_interval guidance_reference",
        "Student and teacher together": "hybrid_teacher hybrid_calls hybrid_level",
        "The picture of a teacher's trajectory": "trajectory",
        "This command": "seed batch device resume overwrite json",
    },
)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of `distmatch sample`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a model folder, a folder of diffusers, a .pkl of EDM, or ring8, grid25, skewed2."""
    base: str = ""
    """For a student of adapters (--train lora) or of a pipeline: its base, the teacher, if it was moved."""
    network: str = ""
    """For a model of a network of your own: MODULE:NAME of its class, of a function that makes it, or of the
    denoiser, as Python would import it from here."""
    n: int | None = None
    """Number of samples; unset: 64, or one for each prompt or row of --conditions."""
    out: Path | None = None
    """.npz (x, labels, conditions), .csv (vectors), .png (a picture), a folder (a file per image or clip), or
    NAME.store for any number (docs/scale.md); unset: samples.npz, or no samples with --trajectory."""
    classes: tuple[str, ...] = ()
    """Classes to draw, in turn, by name or number; unset: drawn according to --class-balance."""
    class_balance: Literal["data", "uniform"] = "data"
    """data: in the proportions of the training data; uniform: uniformly."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A prompt, for pipelines and models of captions; once for each prompt, drawn in turn."""
    prompts: str = ""
    """File of prompts: text, .jsonl, .csv or .parquet, or a folder of images with metadata.jsonl."""
    negative_prompt: str = ""
    """What the guidance of a teacher leads away from, in place of its null prompt."""
    conditions: Path | None = None
    """.npz of the samples' conditioning, a row for each: labels, condition_NAME (docs/conditioning.md)."""
    clip: bool = False
    """Clip values to the range of the training data; images always are."""
    solver: str = "heun"
    """Solver for a teacher: heun, dpmpp-2m, tab:3, ipndm:3, ddim:1, ...; docs/solvers.md lists them."""
    steps: int = 18
    """Steps of a teacher's solver; 18 of Heun's are 35 network calls, 18 of a multistep solver's are 18."""
    grid: Literal["auto", "karras", "log", "uniform", "power", "log-snr", "time"] = "auto"
    """Grid of noise levels; auto: that of the teacher's own sampler, karras for most."""
    path: str = ""
    """Noise path of solvers and grids that use its time (tab; power and time), such as vp:beta_max=12; empty:
    the teacher's own, or vp."""
    guidance: float = 1.0
    """Guidance scale of a teacher, or of a student that receives it (--guidance-range); 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where LOW < sigma <= HIGH."""
    guidance_reference: str = ""
    """A weaker teacher as reference (autoguidance); empty: the teacher's unconditional prediction."""
    hybrid_teacher: str = ""
    """For a student: a teacher that takes the first steps, with the solver above (docs/hybrid.md)."""
    hybrid_calls: int = 1
    """Steps of the student that the teacher takes over: 0 none, 1 down to the first possible sigma"""
    hybrid_level: float | None = None
    """Noise level at which the student takes over, in place of --hybrid-calls."""
    trajectory: Path | None = None
    """A .png to draw: the teacher's predictions along its trajectory, and when the layout is determined."""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    seed: int = 0
    """Seed of the initial noise and labels."""
    batch: int | None = None
    """Samples per batch; unset: 1024, or for a .store measured."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    resume: bool = False
    """Continue a .store, with the options it was begun with."""
    overwrite: bool = False
    """Replace --out if it exists."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, samples, writes."""
    o = parse(SampleOptions, argv, verb="sample", said=HELP)
    if min(o.n or 1, o.batch or 1) < 1 or 0 in (o.n, o.batch):
        raise UserError("--n and --batch must be at least 1", got=f"{o.n} and {o.batch}")
    if not math.isfinite(o.guidance):
        raise UserError("--guidance must be finite", got=o.guidance)
    from distmatch.base.ranks import joined
    from distmatch.cli.output import check_form, tell_conversion, write_samples
    from distmatch.cli.sample_conditions import (
        HOW,
        at_scale,
        conditioning_of,
        negative_of,
        prompts_of,
        takes_scale,
    )
    from distmatch.cli.sample_store import SUFFIX, draw_store
    from distmatch.cli.trajectory import check_picture
    from distmatch.data.classes import names_for
    from distmatch.data.columns import columns_of, decoded
    from distmatch.data.files import load_conditioning
    from distmatch.data.kinds import kind_of_shape
    from distmatch.diffusion.conditioning import labels_of
    from distmatch.training.models import open_model, refuse_existing
    from distmatch.training.ranges import Range, require_range
    from distmatch.training.sample_store import check_store
    from distmatch.training.shared_draw import draw_shared

    out = o.out if o.out is not None or o.trajectory is not None else Path("samples.npz")
    to_store = out is not None and out.suffix.lower() == SUFFIX
    for path in (None if to_store else out, o.trajectory):
        if path is not None:
            refuse_existing(path, o.overwrite)
    ranks = joined()
    ranks.require_same("options", repr(o))  # and all have looked before the first one writes
    if o.resume and not to_store:
        raise UserError("--resume continues a store", got=f"--out {out}", expected="--out NAME.store")
    conditions = None if o.conditions is None else load_conditioning(o.conditions)
    texts = prompts_of(o)
    n = o.n or (conditions.batch_size if conditions is not None else None) or len(texts) or 64
    if out is not None and to_store:
        check_store(out, n, resume=o.resume, overwrite=o.overwrite)
    options = o.pipeline.given()
    model = open_model(o.model, o.base, imported(o.network), {} if o.hybrid_teacher else options)
    tell_conversion(o.model, model.conversion)
    teacher = open_model(o.hybrid_teacher, options=options) if o.hybrid_teacher else None
    away = negative_of(o, teacher or model)
    ask = _asked(o, model, teacher, away)
    if out is not None:
        check_form(out, kind_of_shape(model.shape), overwrite=o.overwrite)
    if o.trajectory is not None:
        check_picture(o.trajectory, ask.teacher or model, n)
    chosen, how = conditioning_of(o, model, n, conditions, texts)
    scaled = o.guidance != 1 and takes_scale(model)

    def rows(first: int, count: int) -> Conditioning:
        return at_scale(chosen(first, count), count, o.guidance) if scaled else chosen(first, count)

    result: dict[str, Any] = {"n": n, **ask.described, **({"class_balance": how} if how else {})}
    result |= {} if conditions is None else {"conditions": str(o.conditions)}
    result |= {"prompts": len(texts)} if texts else {}
    bounds = require_range(model.trained_on) if o.clip else Range.of(model.trained_on)
    if out is not None and to_store:
        result |= draw_store(o, out, model, n, ask.draw, rows, texts, bounds if o.clip else None)
    elif out is not None:
        where: dict[str, Any] = {"batch": o.batch or BATCH, "ranks": ranks, "place": out.absolute().parent}
        drawn = draw_shared(ask.draw, n, rows(0, n), model.shape, **where)
    if not ranks.main:
        return
    if out is not None and not to_store:
        x = model.scaling.export(drawn.x)
        columns = columns_of(model.trained_on, x.shape[1]) if x.ndim == 2 else ()
        if out.suffix.lower() == ".csv":
            x = decoded(columns, x)
        if model.scaling.kind == "vector" and bounds is not None:
            result |= bounds.outside(x.reshape(-1, x.shape[-1]))
            x = bounds.clip(x) if o.clip else x
        names = names_for(model.classes.names, model.num_classes)
        captions = [texts[i % len(texts)] for i in range(n)] if texts else []
        said = labels_of(drawn.conditioning) if texts else drawn.conditioning
        write_samples(out, x, said, o.overwrite, names, columns, captions)
        seconds = round(drawn.seconds_per_1000, 5)
        result |= {"out": str(out), "nfe": drawn.nfe, "seconds_per_1000": seconds}
    if o.trajectory is not None:
        result |= {"trajectory": str(o.trajectory), "decided": _picture(o, ask, n, rows(0, n))}
    if o.json:
        print_json(result)
        return
    if out is not None:
        calls = "1 network call" if result["nfe"] == 1 else f"{result['nfe']} network calls"
        print(f"{n} samples in {out} ({result['model']}, {calls} each)")
        if to_store:
            print(f"batch {result['batch']}, {result['samples_per_second']:,.4g} samples/s")
        if how:
            print(f"classes: {HOW[how]}")
        if conditions is not None:
            print(f"conditions: {', '.join(conditions)} from {o.conditions}")
        if result.get("outside_range", 0) >= 0.0005 or result.get("below_zero"):
            print(_range_line(result, o.clip))
    for share, level in result.get("decided", {}).items():
        print(f"{float(share):.0%} of the layout is determined at sigma {level:.3g}")


BATCH = 1024
"""Samples per batch where none is given and none is measured."""


def _range_line(result: dict[str, Any], clipped: bool) -> str:
    """What the values outside the range of the training data come to, in words."""
    negative = ", ".join(f"{name} {share:.1%}" for name, share in result["below_zero"].items())
    below = f"; negative values, which the data do not have: {negative}" if negative else ""
    end = "moved to its edge" if clipped else "--clip moves them to its bounds"
    return f"range: {result['outside_range']:.1%} of the values lie outside that of the data{below} ({end})"


@dataclass(frozen=True)
class _Asked:
    """What the options come to, checked.

    Attributes:
        model: The model named.
        teacher: The teacher that goes the first part of the way, or None.
        sampling: The settings of the one or the other.
        draw: Draws samples, given their number and conditioning; from ``first`` on, in batches of ``batch``.
        described: What the result says of it.
    """

    model: Model
    teacher: Model | None
    sampling: Sampling
    draw: Callable[..., SampleResult]
    described: dict[str, Any]


def _asked(o: SampleOptions, model: Model, teacher: Model | None, away: Conditioning | None) -> _Asked:
    """Which model is sampled how; refuses what does not go together."""
    from distmatch.cli.sample_conditions import refuse, takes_scale
    from distmatch.training.hybrid import draw_hybrid, plan_hybrid
    from distmatch.training.sampling import HEUN

    size = o.batch or BATCH
    if teacher is not None:
        if o.hybrid_level is not None:
            refuse(o, ("hybrid_calls",), "--hybrid-level already determines where the student takes over")
        sampling = _sampling(o, away)
        part: dict[str, Any] = {"calls": o.hybrid_calls, "level": o.hybrid_level}
        way = plan_hybrid(teacher, model, sampling, **part)

        def draw(n: int, conditioning: Conditioning, first: int = 0, batch: int = size) -> SampleResult:
            how: dict[str, Any] = {"batch": batch, "device": o.device, "first": first}
            return draw_hybrid(teacher, model, n, conditioning, o.seed, sampling, **part, **how)

        level = way.student_sigmas[0] if way.student_sigmas else 0.0
        return _Asked(
            model, teacher, sampling, draw, {"model": "hybrid", "solver": o.solver, "handover": level}
        )
    refuse(o, ("hybrid_calls", "hybrid_level"), "it needs --hybrid-teacher")
    if model.teacher is None:
        _refuse_for_students(o, takes_scale(model))
        sampling = HEUN
    else:
        sampling = _sampling(o, away)
        sampling.check(model.teacher)

    def alone(n: int, conditioning: Conditioning, first: int = 0, batch: int = size) -> SampleResult:
        how: dict[str, Any] = {"batch": batch, "device": o.device, "first": first}
        return model.draw(n, conditioning, o.seed, sampling, **how)

    solver = None if model.kind == "student" else o.solver
    return _Asked(model, None, sampling, alone, {"model": model.kind, "solver": solver})


def _picture(o: SampleOptions, ask: _Asked, n: int, conditioning: Conditioning) -> dict[str, float]:
    """Draws --trajectory, with the student and the hybrid beside it where there are such."""
    from distmatch.cli.trajectory import draw_trajectory, shown

    if o.trajectory is None:
        raise RuntimeError("no picture was requested")
    common: dict[str, Any] = {"batch": o.batch or BATCH, "device": o.device}
    beside = {}
    if ask.teacher is not None:
        rows = shown(ask.model, n)
        first = conditioning.index(slice(rows))
        beside["student"] = ask.model.draw(rows, first, o.seed, **common).x
        beside["hybrid"] = ask.draw(rows, first).x
    whose = ask.teacher or ask.model
    return draw_trajectory(
        o.trajectory, whose, ask.sampling, conditioning, n, o.seed, beside=beside, **common
    )


def _refuse_for_students(o: SampleOptions, scaled: bool) -> None:
    """A student has no use for the options of a solver; ``scaled`` ones receive their guidance scale.

    Raises:
        UserError: One of them was given.
    """
    from distmatch.cli.sample_conditions import refuse

    how = ("solver", "steps", "grid", "path", "guidance_interval", "guidance_reference", "negative_prompt")
    names = how if scaled else (*how, "guidance")
    fix = "leave them out, or distil with --num-steps and --guidance; solvers are for teachers"
    refuse(
        o,
        names,
        "the steps and the guidance of a student are fixed by training: there is no ODE to solve",
        fix,
    )


def _sampling(o: SampleOptions, away: Conditioning | None) -> Sampling:
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
        negative=away,
        reference=load_teacher(o.guidance_reference) if o.guidance_reference else None,
    )
