"""Writing samples in the form that the file name asks for."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_folder, atomic_write
from distmatch.data.classes import folder_names, share_warning
from distmatch.data.columns import Column, table_text
from distmatch.data.kinds import Kind, kind_of_array
from distmatch.diffusion.conditioning import ConditioningLike, labels_of
from distmatch.report.figures import scatter_png
from distmatch.report.grid import animation, save_grid
from distmatch.report.sequences import sequences_png
from distmatch.training.evaluation import npz_bytes


def write_samples(
    path: Path,
    x: np.ndarray,
    conditioning: ConditioningLike,
    overwrite: bool,
    class_names: Sequence[str] = (),
    columns: Sequence[Column] = (),
    captions: Sequence[str] = (),
) -> None:
    """Writes samples to an ``.npz``, a ``.csv``, a ``.png`` picture, or a folder of one file each.

    Args:
        path: Where to; the suffix decides.
        x: Images (N, H, W[, C]) or video (N, T, H, W, C) uint8, which is written as animated PNG; or vectors
            (N, D) or sequences (N, L, D), float32 or float64.
        conditioning: What they are conditioned on: labels (N,), a conditioning, or None. Fields other than
            labels are written to an ``.npz`` only.
        overwrite: Whether an existing distmatch folder may be replaced.
        class_names: Names of the classes: those of the sub-folders, where they can be.
        columns: Of vectors, for a ``.csv``.
        captions: The prompt of each sample: ``prompts`` in an ``.npz``, ``metadata.jsonl`` in a folder.

    Raises:
        UserError: See :func:`check_form`; or the place cannot be written.
    """
    suffix = path.suffix.lower()
    kind = kind_of_array(x)
    labels = labels_of(conditioning)
    check_form(path, kind, overwrite=overwrite)
    if suffix == ".npz":
        atomic_write(path, npz_bytes(x, conditioning, class_names, captions))
    elif suffix == ".csv":
        atomic_write(path, table_text(columns, x, None if labels is None else labels.numpy(), class_names))
    elif suffix == ".png" and kind in ("image", "video"):
        save_grid(path, x, max(1, int(np.ceil(np.sqrt(len(x))))))
    elif suffix == ".png":
        atomic_write(path, scatter_png(x) if kind == "vector" else sequences_png(x))
    else:
        names = folder_names(class_names)
        with atomic_folder(path) as folder:
            lines = []
            for i, sample in enumerate(x):
                place = folder if labels is None else folder / _sub_folder(int(labels[i]), names)
                place.mkdir(exist_ok=True)
                frames = sample if kind == "video" else sample[None]
                pictures = [Image.fromarray(f[..., 0] if f.shape[-1:] == (1,) else f) for f in frames]
                (place / f"{i:06d}.png").write_bytes(animation(pictures))
                if captions:
                    name = str((place / f"{i:06d}.png").relative_to(folder))
                    lines.append(json.dumps({"file_name": name, "text": captions[i]}) + "\n")
            if lines:
                (folder / "metadata.jsonl").write_text("".join(lines))


def _sub_folder(label: int, names: Sequence[str]) -> str:
    """The folder of a class; samples that were drawn without a class have their own."""
    return names[label] if 0 <= label < len(names) else str(label)


def tell_conversion(name: str, conversion: str) -> None:
    """Says on stderr how far a model from elsewhere is from its original; nothing for another."""
    if conversion:
        print(f"{name}: {conversion}", file=sys.stderr)


def warn_of_shares(labels: Tensor, reference: Tensor, names: Sequence[str]) -> None:
    """Warns where samples hold the classes in other shares than the real data."""
    warning = share_warning(labels, reference, names)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)


def check_form(path: Path, kind: Kind, *, overwrite: bool) -> None:
    """Checks that samples can be written to ``path``, before any are drawn.

    Args:
        path: The file or folder; its suffix decides.
        kind: What the samples are.
        overwrite: Whether an existing distmatch folder may be replaced.

    Raises:
        UserError: A suffix that is not for such samples, or a folder that is not ours to replace.
    """
    suffix = path.suffix.lower()
    if suffix == ".store":
        return
    own = {"vector": ".csv", "sequence": ".npz"}.get(kind, "")  # beside what every kind has
    if suffix not in (".npz", ".png", own):
        raise UserError(
            "samples cannot be written in this form",
            got=f"--out {path} for {kind}s",
            expected=".npz, .png, .store, for vectors .csv, or a folder of images or video without a suffix",
            fix="choose another --out",
        )
    if path.is_dir() and (suffix != "" or not (overwrite and _holds_only_images(path))):
        raise UserError(f"{path} holds something else and was left alone", fix="choose another --out")
    parent = next((p for p in path.absolute().parents if p.exists()), path)
    if not parent.is_dir():
        raise UserError(f"{parent} is a file", got=f"--out {path}", fix="choose another --out")


def _holds_only_images(folder: Path) -> bool:
    """Whether a folder can be replaced: nothing in it but PNG files and their prompts."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return folder.is_dir() and all(f.suffix == ".png" or f.name == "metadata.jsonl" for f in files)
