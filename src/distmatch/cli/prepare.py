"""`distmatch prepare`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from distmatch.base.errors import UserError
from distmatch.base.rules import Rule, check_rules
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import parse
from distmatch.training.pipeline_options import PipelineOptions

HELP = Help(
    """Read data into a store, from which any number of samples are trained on at constant memory.

example: distmatch prepare photos/ --size 256 --out photos-256
         distmatch prepare shards/ --out store --workers 8
         distmatch prepare shards/ --teacher pipeline/ --size 512 --out latents
         distmatch train --data photos-256 --out runs/teacher""",
    short="source out size labels teacher skip_bad workers overwrite seed json",
)
_PASSED = ("labels", "image", "label", "caption", "skip_bad", "workers", "overwrite")
_Workers = Annotated[int | None, Rule("must be at least 1", lambda value: value is None or value >= 1)]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(PipelineOptions):
    """Options of `distmatch prepare`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder of images, WebDataset tars (one, or a folder of them), Parquet (the same), a data set saved by
    datasets, an array, a table, or the name of data."""
    out: Path
    """The folder of the store. Where a part of it is there already, it is continued."""
    size: tuple[int, ...] | None = None
    """Height and width in pixels, or one number for both: the largest part of this shape around the center
    of each image is resized to it. Unset: images keep their size, which must be the same; with --teacher, the
    size of its images."""
    labels: bool = True
    """Whether classes are read."""
    image: str = ""
    """In tars and tables with several images of a sample: the extension or column of the one to read."""
    label: str = ""
    """In tars and tables: the field or column of the class; empty: label, labels or cls."""
    caption: str = ""
    """In tars and tables: the field or column of the caption; empty: text, prompt or caption."""
    teacher: str = ""
    """A pipeline or diffusers folder: store the latents of its autoencoder, and its encodings of captions."""
    device: str = "auto"
    """Where --teacher encodes: auto, cpu, cuda, cuda:1, mps."""
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
        super().__post_init__()
        check_rules(self)
        alone = [name for name in ("frames", "max_tokens", "tokens", "null_prompt") if getattr(self, name)]
        alone += ["device"] if self.device != "auto" else []
        if alone and not self.teacher:
            raise UserError(
                f"--{alone[0].replace('_', '-')} does nothing without --teacher",
                got=getattr(self, alone[0]),
                fix="omit it, or encode images and captions with --teacher FOLDER",
            )


def run(argv: list[str]) -> None:
    """Parses, reads and writes, prints what there is."""
    o = parse(PrepareOptions, argv, verb="prepare", said=HELP)
    from distmatch.base.memory import binary_size
    from distmatch.data.classes import listed

    began = time.perf_counter()
    options: dict[str, Any] = {name: getattr(o, name) for name in _PASSED}
    if o.teacher:
        from distmatch.training.devices import pick_device
        from distmatch.training.prepare_latents import prepare_latents
        from distmatch.training.teachers import open_teacher

        teacher = open_teacher(o.teacher, **o.given())[0]
        index = prepare_latents(o.source, o.out, teacher, pick_device(o.device), **options)
    else:
        from distmatch.data.store.prepare import prepare

        size = (o.size[0], o.size[-1]) if o.size else None
        index = prepare(o.source, o.out, size=size, **options)
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
    verb = f"distill --teacher {o.teacher}" if o.teacher else "train"
    print(f"next: distmatch {verb} --data {o.out} --out runs/{'student' if o.teacher else 'teacher'}")
