"""`distmatch export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.imported import imported
from distmatch.cli.parse import parse

HELP = Help(
    """Export a model, or convert a pretrained teacher into a model folder.

example: distmatch export runs/demo --to safetensors --out student
         distmatch export runs/demo --to onnx --out student-onnx --license apache-2.0
         distmatch export runs/faces --to diffusers --out pipeline
         distmatch export runs/sd3 --to lora --out lora
         distmatch export runs/sd3 --to pipeline --out pipeline
         distmatch export edm-cifar10-32x32-cond-vp.pkl --out teachers/cifar10
         distmatch export pipeline/ --null-class 10 --out teachers/mine"""
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `distmatch export`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a model folder, a folder of diffusers, or a .pkl of EDM or EDM2 (it is not run)."""
    out: Path
    """The folder to write."""
    to: Literal["safetensors", "diffusers", "onnx", "lora", "pipeline"] = "safetensors"
    """safetensors: model.safetensors and config.json, which from_pretrained reads.
    diffusers: a pipeline that plain diffusers loads and samples in one step; students of its networks only.
    onnx: a graph of the whole student, any batch size, checked in onnxruntime.
    lora: the adapters of a student of a pipeline, for load_lora_weights of diffusers and for ComfyUI.
    pipeline: a student of a pipeline as a whole pipeline, which a plain call of diffusers samples.
    All have a model card."""
    license: str = ""
    """The licence that the model card states, such as apache-2.0; empty keeps that of the model."""
    base: str = ""
    """For a student of adapters (--train lora) or of a pipeline: its base, the teacher, if it was moved."""
    network: str = ""
    """For a model of a network of your own: MODULE:NAME of its class, of a function that makes it, or of the
    denoiser, as Python would import it from here."""
    vae: str = ""
    """Folder of the autoencoder of a teacher's latents, if it is not in the pipeline (EDM2)."""
    scheduler: str = ""
    """Folder of the scheduler of a diffusers network, if it is not next to it."""
    null_class: int | None = None
    """The label that means "unconditional" in a diffusers network, needed for guidance."""
    overwrite: bool = False
    """Replace --out if it holds a model."""
    seed: int = 0
    """Accepted by every command; an export draws no random numbers."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, checks the model by loading it, writes it."""
    o = parse(ExportOptions, argv, verb="export", said=HELP)
    from distmatch.data import TOY_NAMES
    from distmatch.training.models import refuse_existing

    if o.model in TOY_NAMES:
        raise UserError(f"{o.model} is a formula, not a network", fix="export a trained model")
    refuse_existing(o.out, o.overwrite)
    about = _teacher_from_pickle(o) or _opened(o)
    if o.json:
        print_json({"out": str(o.out), "to": o.to, **about})
    else:
        difference = about.get("difference")
        checked = "" if difference is None else f", difference from the student at most {difference:.1e}"
        adapters = f" and {about['adapters']:,} in adapters" if "adapters" in about else ""
        print(f"{about['kind']} with {about['parameters']:,} parameters{adapters} in {o.out}{checked}")


def _teacher_from_pickle(o: ExportOptions) -> dict[str, Any] | None:
    """Converts a network pickle of EDM or EDM2; None where the model is something else."""
    from distmatch.interop import convert_edm
    from distmatch.interop.edm_checkpoint import is_network_pickle

    if not is_network_pickle(o.model) or not _options(o).keys() <= {"vae"}:
        return None
    _refuse_teacher(o)
    denoiser: Any = convert_edm(o.model, o.out, vae=o.vae or None, license=o.license)
    return _described("teacher", denoiser)


def _opened(o: ExportOptions) -> dict[str, Any]:
    """Writes a model that can be opened, a student with the measurements of its run."""
    from distmatch.cli.output import tell_conversion
    from distmatch.interop import (
        export_diffusers,
        export_lora,
        export_onnx,
        export_pipeline,
        save_denoiser,
    )
    from distmatch.methods.student import student_from
    from distmatch.training.teachers import open_denoiser

    denoiser, about = open_denoiser(o.model, **_options(o))
    if o.license:
        about["license"] = o.license
    if about.get("kind") != "student":
        _refuse_teacher(o)
        save_denoiser(o.out, denoiser, about, metrics=_metrics(o))
        tell_conversion(o.model, str(about.get("conversion", "")))
        return _described(str(about.get("kind", "model")), denoiser)
    student = student_from(denoiser, about)
    writers = {
        "diffusers": export_diffusers,
        "onnx": export_onnx,
        "lora": export_lora,
        "pipeline": export_pipeline,
    }
    if o.to not in ("lora", "pipeline"):  # these need to know the base
        student = student.merged()
    about = _described("student", student.denoiser)
    if o.to == "safetensors":
        student.save_pretrained(o.out, metrics=_metrics(o))
        return about
    return {**about, "difference": writers[o.to](student, o.out, metrics=_metrics(o))}


def _options(o: ExportOptions) -> dict[str, Any]:
    """The arguments for a pretrained teacher."""
    options = {"base": o.base, "vae": o.vae, "scheduler": o.scheduler, "null_class": o.null_class}
    options["network"] = imported(o.network)
    return {name: value for name, value in options.items() if value not in ("", None)}


def _refuse_teacher(o: ExportOptions) -> None:
    """Refuses to write a teacher in a form that makes samples.

    Raises:
        UserError: It is to become one.
    """
    if o.to != "safetensors":
        raise UserError(
            f"--to {o.to} is for students, which are generators; a teacher is one part of a sampler",
            got=f"{o.model}, a teacher",
            fix="distil it first, or export it with --to safetensors",
        )


def _metrics(o: ExportOptions) -> dict[str, Any] | None:
    """What was measured of the run that the model is from."""
    from distmatch.base.files import read_json

    file = Path(o.model) / "metrics.json"
    return read_json(file) if file.is_file() else None


def _described(kind: str, denoiser: Any) -> dict[str, Any]:
    from distmatch.nets.shared import parameter_counts

    parameters, adapters = parameter_counts(denoiser)
    return {"kind": kind, "parameters": parameters, **({"adapters": adapters} if adapters else {})}
