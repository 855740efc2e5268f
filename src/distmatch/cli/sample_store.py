"""`distmatch sample --out NAME.store`: any number of samples, at constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from distmatch.base.errors import UserError
from distmatch.base.ranks import joined
from distmatch.data.classes import names_for
from distmatch.data.columns import columns_of
from distmatch.data.store.reading import CONDITION
from distmatch.diffusion.conditioning import LABEL, Conditioning
from distmatch.training.models import Model, open_model
from distmatch.training.ranges import Range
from distmatch.training.sample_store import Drawing, as_stored, fingerprint, sample_store, stored_scaling
from distmatch.training.sampling import SampleResult

SUFFIX = ".store"
_ELSEWHERE = (
    *("model", "base", "network", "prompt", "prompts", "conditions", "hybrid_teacher", "guidance_reference"),
    *("pipeline", "n", "seed", "out", "batch", "device", "overwrite", "resume", "json", "trajectory"),
)
"""Options on which samples do not depend, or that the request has in another form."""
_TYPES = {"b": np.uint8, "i": np.int64, "u": np.int64}


def draw_store(
    o: Any,
    out: Path,
    model: Model,
    n: int,
    draw: Callable[..., SampleResult],
    rows: Callable[[int, int], Conditioning],
    texts: Sequence[str],
    bounds: Range | None,
) -> dict[str, Any]:
    """Draws what the options ask for into a store.

    Args:
        o: The options.
        out: The folder.
        model: The model.
        n: Number of samples.
        draw: Draws so many samples under a conditioning, from a number on, in batches of a size.
        rows: The conditioning of samples (first, count).
        texts: The prompts.
        bounds: What vectors are clipped to.

    Returns:
        What the result says of it.

    Raises:
        UserError: The place or the samples cannot be used.
        KeyboardInterrupt: With the command that continues.
    """
    calls = 0

    def arrays(first: int, count: int, batch: int) -> dict[str, np.ndarray]:
        nonlocal calls
        drawn = draw(count, rows(first, count), first=first, batch=batch)
        calls = drawn.nfe
        x = model.scaling.export(drawn.x)
        if bounds is not None:
            x = bounds.clip(x)
        kept = {LABEL: drawn.conditioning.label} if texts else dict(drawn.conditioning)
        found = {"x": as_stored(x)}
        for name, value in kept.items():
            if value is not None:
                found["labels" if name == LABEL else f"{CONDITION}{name}"] = _stored(value.numpy())
        if "labels" in found and int(found["labels"].min()) < 0:
            raise UserError("a store has samples with classes, or without", got="a sample of class -1")
        return found

    options = {f.name: getattr(o, f.name) for f in fields(o) if f.name not in _ELSEWHERE}
    request = {
        "source": o.model,
        "samples": n,
        "seed": o.seed,
        "model": fingerprint(model),
        **({"pipeline": o.pipeline.given()} if o.pipeline.given() else {}),
        **{key: value for key, value in _plain(options).items() if value},
    }
    if texts:
        request["prompts"] = {"number": len(texts), "sha256": _digest("\n".join(texts).encode())}
    for name in ("hybrid_teacher", "guidance_reference"):
        if getattr(o, name):
            request[name] = fingerprint(open_model(getattr(o, name), options=o.pipeline.given()))
    if o.conditions is not None:
        request["conditions"] = _digest(o.conditions.read_bytes())
    names = names_for(model.classes.names, model.num_classes)
    columns = columns_of(model.trained_on, model.shape[-1]) if len(model.shape) == 1 else ()
    drawing = Drawing(arrays, n, request, stored_scaling(model.scaling), names, columns, texts)
    command = f"the same command with --resume continues: --out {out}"
    try:
        index, rate = sample_store(
            out,
            drawing,
            batch=o.batch,
            ranks=joined(),
            resume=o.resume,
            overwrite=o.overwrite,
            continued_by=command,
        )
    except KeyboardInterrupt as stop:
        stop.args = (command,)
        raise
    return {
        "out": str(out),
        "batch": index["request"]["batch"],
        "nfe": calls,
        "samples_per_second": round(rate, 3),
        "digest": index["digest"],
    }


def _stored(values: np.ndarray) -> np.ndarray:
    """In a type that a store has."""
    return values.astype(_TYPES.get(values.dtype.kind, values.dtype), copy=False)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(options))
    return values


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
