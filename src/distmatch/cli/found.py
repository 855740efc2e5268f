"""What a dry run found in the data: numbers, shape, classes, range, and a picture if requested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.cli.output import write_samples
from distmatch.data import Dataset
from distmatch.data.classes import Classes, listed, names_of
from distmatch.training.models import refuse_existing

_SHOWN = {"vector": 2000, "sequence": 20, "image": 64, "video": 64}  # in a picture


def check_grid(path: Path | None, *, dry_run: bool, overwrite: bool) -> None:
    """Checks before any work that the picture of the data can be written.

    Raises:
        UserError: There is no dry run, it is no .png, or it exists.
    """
    if path is None:
        return
    if not dry_run:
        raise UserError("--grid is part of a dry run", got=f"--grid {path}", fix="add --dry-run")
    if path.suffix.lower() != ".png":
        raise UserError("the grid is a picture", got=f"--grid {path}", expected="a name that ends in .png")
    refuse_existing(path, overwrite, "--grid")


def describe_found(data: Dataset) -> dict[str, Any]:
    """What was found, as JSON: ``samples``, ``shape``, ``classes`` with their counts, ``range``, ..."""
    counts, constant = Classes.of(data).counts, data.constant_columns()
    return {
        "name": data.name,
        "kind": data.kind,
        "samples": len(data),
        "shape": list(data.shape),
        "classes": dict(zip(names_of(data), counts, strict=True)) if counts else {},
        "range": [float(data.extremes[0].min()), float(data.extremes[1].max())],
        "scaling": data.scaling.rule,
        **({"constant": constant} if constant else {}),
        **({"columns": [column.to_dict() for column in data.columns]} if data.columns else {}),
    }


def found_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    low, high = found["range"]
    shape = "x".join(map(str, found["shape"]))
    classes = [f"{name} {count:,}" for name, count in found["classes"].items()]
    columns = [
        f"{c['name']} ({len(c['values'])} words)" if c["values"] else c["name"]
        for c in found.get("columns", ())
    ]
    return [
        f"data        {found['name']}: {found['samples']:,} {found['kind']}s of {shape}, values from "
        f"{low:.6g} to {high:.6g} ({found['scaling']})",
        f"classes     {len(classes)}: {listed(classes)}" if classes else "classes     none",
        *([f"columns     {len(columns)}: {listed(columns)}"] if columns else []),
        *(
            [f"constant    {listed(found['constant'])}: a single value, which samples repeat"]
            if found.get("constant")
            else []
        ),
    ]


def write_grid(path: Path, data: Dataset, seed: int, overwrite: bool) -> None:
    """A picture of some of the data, drawn at random, images in the order of their classes."""
    rows = torch.randperm(len(data), generator=generator(seed, "grid"))[: _SHOWN[data.kind]]
    if data.labels is not None:
        rows = rows[data.labels[rows].argsort(stable=True)]
    x, labels = data.batch(rows)
    write_samples(path, data.scaling.export(x), labels, overwrite)
