"""`distmatch export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.parse import parse, print_json

ABOUT = """Write a model for use elsewhere, or turn a teacher from elsewhere into a model folder.

example: distmatch export runs/demo --to safetensors --out student
         distmatch export edm-cifar10-32x32-cond-vp.pkl --out teachers/cifar10
         distmatch export pipeline/ --null-class 10 --out teachers/mine"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Everything `distmatch export` can be told."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a model folder, a folder of diffusers, or a .pkl of EDM or EDM2 (it is not run)."""
    out: Path
    """The folder to write."""
    to: Literal["safetensors"] = "safetensors"
    """safetensors: model.safetensors and config.json, which from_pretrained reads."""
    vae: str = ""
    """Folder of the autoencoder that a teacher's latents are from, where it is not in the pipeline (EDM2)."""
    scheduler: str = ""
    """Folder of the scheduler of a network of diffusers, where it is not beside it."""
    null_class: int | None = None
    """The label that means "no condition" to a network of diffusers, which makes guidance possible."""
    overwrite: bool = False
    """Replace --out if it holds a model."""
    seed: int = 0
    """Accepted by every verb; an export draws no random numbers."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, checks the model by loading it, writes it."""
    o = parse(ExportOptions, argv, verb="export", about=ABOUT)
    from distmatch.cli.output import tell_conversion
    from distmatch.data import TOY_NAMES
    from distmatch.interop import convert_edm, save_denoiser
    from distmatch.interop.edm_checkpoint import is_network_pickle
    from distmatch.training.models import refuse_existing
    from distmatch.training.teachers import open_denoiser

    if o.model in TOY_NAMES:
        raise UserError(f"{o.model} is a formula, not a network", fix="export a trained model")
    refuse_existing(o.out, o.overwrite)
    options = {"vae": o.vae, "scheduler": o.scheduler, "null_class": o.null_class}
    options = {name: value for name, value in options.items() if value not in ("", None)}
    if is_network_pickle(o.model) and options.keys() <= {"vae"}:
        denoiser: Any = convert_edm(o.model, o.out, vae=o.vae or None)
        extra: dict[str, Any] = {"kind": "teacher"}
    else:
        denoiser, extra = open_denoiser(o.model, **options)
        save_denoiser(o.out, denoiser, extra)
        tell_conversion(o.model, str(extra.get("conversion", "")))
    count = sum(p.numel() for p in denoiser.parameters())
    if o.json:
        print_json({"out": str(o.out), "kind": extra.get("kind"), "parameters": count})
    else:
        print(f"{extra.get('kind', 'model')} with {count:,} parameters in {o.out}")
