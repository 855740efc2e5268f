"""`distmatch export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from distmatch.base.errors import UserError
from distmatch.cli.parse import parse, print_json

ABOUT = """Write a model for use elsewhere.

example: distmatch export runs/demo --to safetensors --out student"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Everything `distmatch export` can be told."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder or a model folder."""
    out: Path
    """The folder to write."""
    to: Literal["safetensors"] = "safetensors"
    """safetensors: model.safetensors and config.json, which from_pretrained reads."""
    overwrite: bool = False
    """Replace --out if it holds a model."""
    seed: int = 0
    """Accepted by every verb; an export draws no random numbers."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, checks the model by loading it, writes it."""
    o = parse(ExportOptions, argv, verb="export", about=ABOUT)
    from distmatch.data import TOY_NAMES
    from distmatch.nets.saved import load_model, save_model
    from distmatch.training.models import refuse_existing

    if o.model in TOY_NAMES:
        raise UserError(f"{o.model} is a formula, not a network", fix="export a trained model")
    refuse_existing(o.out, o.overwrite)
    denoiser, extra = load_model(o.model)
    save_model(o.out, denoiser, extra)
    count = sum(p.numel() for p in denoiser.parameters())
    if o.json:
        print_json({"out": str(o.out), "kind": extra.get("kind"), "parameters": count})
    else:
        print(f"{extra.get('kind', 'model')} with {count:,} parameters in {o.out}")
