"""`distmatch prepare`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distmatch.base.errors import UserError
from distmatch.base.rules import Rule, check_rules
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import parse

HELP = Help(
    """Read data into a store, from which any number of samples are trained on at constant memory.

example: distmatch prepare photos/ --size 256 --out photos-256
         distmatch prepare shards/ --out store --workers 8
         distmatch train --data photos-256 --out runs/teacher"""
)
_Workers = Annotated[int | None, Rule("must be at least 1", lambda value: value is None or value >= 1)]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of `distmatch prepare`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder of images, WebDataset tars (one, or a folder of them), Parquet (the same), a data set saved by
    datasets, an array, a table, or the name of data."""
    out: Path
    """The folder of the store. Where a part of it is there already, it is continued."""
    size: tuple[int, ...] | None = None
    """Height and width in pixels, or one number for both: the largest part of this shape around the center
    of each image is resized to it. Unset: images keep their size, which must be the same."""
    labels: bool = True
    """Whether classes are read."""
    image: str = ""
    """In tars and tables with several images of a sample: the extension or column of the one to read."""
    label: str = ""
    """In tars and tables: the field or column of the class; empty: label, labels or cls."""
    caption: str = ""
    """In tars and tables: the field or column of the caption; empty: text, prompt or caption."""
    skip_bad: bool = False
    """Leave out what cannot be read; else the command ends with a list of it."""
    workers: _Workers = None
    """Threads that read; unset: one for each processor. The store does not depend on it."""
    overwrite: bool = False
    """Replace the store in --out."""
    seed: int = 0
    """Accepted by every command; nothing is drawn at random here."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        check_rules(self)
        if self.size is not None and (not 1 <= len(self.size) <= 2 or min(self.size) < 1):
            raise UserError(
                "--size is a height and a width in pixels, or one number for both",
                got=" ".join(map(str, self.size)),
                fix="for example --size 256",
            )


def run(argv: list[str]) -> None:
    """Parses, reads and writes, prints what there is."""
    o = parse(PrepareOptions, argv, verb="prepare", said=HELP)
    from distmatch.base.memory import binary_size
    from distmatch.data.classes import listed
    from distmatch.data.store.prepare import prepare

    began = time.perf_counter()
    index = prepare(
        o.source,
        o.out,
        size=(o.size[0], o.size[-1]) if o.size else None,
        labels=o.labels,
        image=o.image,
        label=o.label,
        caption=o.caption,
        skip_bad=o.skip_bad,
        workers=o.workers,
        overwrite=o.overwrite,
    )
    fields = {field["name"]: field for field in index["fields"]}
    found = {
        "store": str(o.out),
        "samples": index["samples"],
        "shape": fields["x"]["shape"],
        "dtype": fields["x"]["dtype"],
        "classes": index["class_names"],
        "captions": "captions" in fields,
        "bytes": sum(file.stat().st_size for file in o.out.glob("*.npy")),
        "skipped": index["skipped"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    if o.json:
        print_json(found)
        return
    classes = f", {len(found['classes'])} classes: {listed(found['classes'])}" if found["classes"] else ""
    shape = "x".join(map(str, found["shape"]))
    print(
        f"{found['samples']:,} samples of {shape} ({found['dtype']}){classes}"
        f"{', captions' if found['captions'] else ''}: {binary_size(found['bytes'])} in {o.out}"
    )
    if found["skipped"]:
        total = found["samples"] + len(found["skipped"])
        print(f"skipped {len(found['skipped']):,} of {total:,} items, which {o.out / 'store.json'} lists:")
        for item, why in found["skipped"][:5]:
            print(f"  {item}: {why}")
    print(f"next: distmatch train --data {o.out} --out runs/teacher")
