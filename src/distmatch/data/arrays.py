"""From arrays to a :class:`Dataset`, with every check that can be made on values alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError, unknown_name
from distmatch.data.columns import Column
from distmatch.data.dataset import Dataset
from distmatch.data.kinds import ARRAYS, KINDS, Kind
from distmatch.data.scaling import Scaling

_LOST = 1e-5  # of a column's half range: rounding beyond this asks for float64
_PROBED, _FEWEST_PROBED = 2**21, 256  # values, and rows, that are counted: all of most tables
_TOLD_APART = 512  # different values of a column that are enough to call it continuous
_BY_AXES: dict[int, Kind] = {
    2: "vector",
    3: "image",
    4: "image",
    5: "video",
}  # what an array is unless it says
_AXES: dict[Kind, tuple[int, ...]] = {"vector": (2,), "sequence": (2, 3), "image": (3, 4), "video": (4, 5)}
_MOST_CLASSES = 1000  # more classes than this need as many samples, or they are not class numbers


def from_arrays(
    x: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | Sequence[int] | None = None,
    *,
    kind: Kind | None = None,
    class_names: Sequence[str] = (),
    name: str = "array",
    columns: tuple[Column, ...] = (),
) -> Dataset:
    """Makes a data set of arrays in memory.

    Args:
        x: Vectors (N, D); images (N, H, W), (N, H, W, C) or (N, C, H, W); or video (N, T, H, W, C) or
            (N, C, T, H, W), each with 1 or 3 channels, where an array that can be read both ways has its
            channels last. Images and video are uint8, bool, or floats in [0, 1], [-1, 1] or [0, 255] (see
            :meth:`Scaling.fit_images`). Sequences (N, L, D) look like grey images: ``kind`` tells them apart.
        labels: (N,) whole numbers from 0, or None. All -1 means unlabeled, as everywhere in this package.
        kind: ``"vector"``, ``"sequence"``, ``"image"`` or ``"video"``; None goes by the number of axes, of
            which 3 and 4 are images. With it (N, L) are sequences of single numbers, and (N, T, H, W) is
            grey video.
        class_names: One name for each class; by default their numbers.
        name: What to call the data in messages.
        columns: Of a table, its columns.

    Raises:
        UserError: Something about the arrays is not as described; the message names it.
    """
    values = _numeric(x, name)
    kind = check_shape(values, kind, name)
    if kind in ("image", "video"):
        raw = pixel_tensor(values, kind, name)
    else:
        values = values[..., None] if kind == "sequence" and values.ndim == 2 else values
        raw = _column_tensor(values, name)
    if bool((raw == raw[:1]).all()):
        raise UserError(
            f"{name}: all samples are the same",
            got=f"{len(raw)} copies of one sample",
            expected="samples that differ",
        )
    scaling = Scaling.fit_images(raw) if kind in ("image", "video") else Scaling.fit_vectors(raw)
    classes = None if labels is None else _labels(labels, len(raw), name)
    names: tuple[str, ...] = ()
    if classes is not None:
        count = int(classes.max()) + 1
        names = tuple(str(c) for c in class_names) or tuple(str(k) for k in range(count))
        if len(names) < count:
            raise UserError(
                f"{name}: too few class names",
                got=f"{len(names)} names, labels up to {count - 1}",
                expected=count,
            )
    data = Dataset(raw, classes, names, name, scaling, columns)
    if scaling.kind == "vector":
        _check_resolution(values.reshape(-1, values.shape[-1]), data)
    return data


def _numeric(x: np.ndarray | Tensor, name: str) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        half = x.is_floating_point() and x.dtype != torch.float64  # bfloat16 has no name in NumPy
        x = x.float().numpy() if half else x.numpy()
    values = np.asarray(x)
    if values.dtype.kind not in "biuf":
        raise UserError(
            f"{name}: the samples are not numbers",
            got=f"an array of type {values.dtype}",
            expected="integers or floats",
            fix="save them as float32, or images as uint8",
        )
    return values


def check_shape(values: np.ndarray, kind: Kind | None, name: str) -> Kind:
    """The kind of samples in an array.

    Raises:
        UserError: There is no such kind, the array has other axes, or too few samples.
    """
    if kind is not None and kind not in KINDS:
        raise unknown_name("kind of samples", kind, KINDS)
    found = kind or _BY_AXES.get(values.ndim)
    if found is None or values.ndim not in _AXES[found]:
        forms = [f"{k}s {ARRAYS[k]}" for k in KINDS if kind in (None, k)]
        raise UserError(
            f"{name}: the array has the wrong number of axes" + (f" for {kind}s" if kind else ""),
            got=f"shape {values.shape}",
            expected="; ".join(forms),
            fix="reshape it; numbers in a row are vectors of length 1: x[:, None]"
            if values.ndim == 1
            else "reshape it",
        )
    if values.size == 0:
        raise UserError(
            f"{name}: there is nothing in it",
            got=f"shape {values.shape}",
            expected="at least 2 samples, and no axis of length 0",
        )
    if len(values) < 2:
        raise UserError(f"{name}: too few samples", got=f"{len(values)}", expected="2 or more")
    return found


def _float_tensor(values: np.ndarray, name: str) -> Tensor:
    """Float32 in native byte order, all finite."""
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is reported just below
        raw = np.array(values, dtype=np.float32, order="C")
    bad = ~np.isfinite(raw)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        raise UserError(
            f"{name}: there are values that are not finite in float32",
            got=f"{int(bad.sum())} of {raw.size}, the first ({values[first]}) at index {first}",
            expected="neither NaN nor infinite",
            fix="remove these samples or fill the gaps",
        )
    return torch.from_numpy(raw)


def _column_tensor(values: np.ndarray, name: str) -> Tensor:
    """Vectors or sequences as float32, or as float64 where float32 would lose much of a column's spread."""
    single = _float_tensor(values, name)
    if values.dtype.kind in "iuf" and values.dtype.itemsize >= 4 and values.dtype != np.float32:
        exact = np.array(values, dtype=np.float64, order="C")
        axes = tuple(range(values.ndim - 1))
        spread = (exact.max(axes) - exact.min(axes)) / 2
        lost = np.abs(exact - single.numpy()).max(axes)
        if bool(((lost > _LOST * spread) & (spread > 0)).any()):
            return torch.from_numpy(exact)
    return single


def _check_resolution(values: np.ndarray, data: Dataset) -> None:
    """Refuses columns whose different values become the same ones in the range of the model.

    Args:
        values: As they came, (rows, D): of sequences all their members.
        data: What was made of them.

    Raises:
        UserError: A column with a few values so far out that float32 cannot tell the others apart.
    """
    count = min(len(values), max(_PROBED // values.shape[1], _FEWEST_PROBED))
    rows = np.linspace(0, len(values) - 1, count).astype(np.int64)
    scaled = data.scaling.to_model(data.raw.flatten(0, -2)[torch.from_numpy(rows)]).numpy()
    before, after = ((np.diff(np.sort(v, 0), axis=0) != 0).sum(0) + 1 for v in (values[rows], scaled))
    lost = after < 0.9 * np.minimum(before, _TOLD_APART)
    if lost.any():
        k = int(lost.argmax())
        names = [f"the column {n}" for c in data.columns for n in [c.name] * c.width]
        which = names[k] if names else f"column {k} (counted from 0)"
        low, high = values[:, k].min(), values[:, k].max()
        raise UserError(
            f"{data.name}: float32 cannot distinguish the values of {which} after scaling",
            got=f"{before[k]} different values become {after[k]}, in a range from {low:.6g} to {high:.6g}",
            expected="values without extreme outliers",
            fix="take its logarithm, or remove the outliers",
        )


def pixel_tensor(values: np.ndarray, kind: Kind, name: str) -> Tensor:
    """Images as (N, C, H, W), video as (N, C, T, H, W), uint8 or float32."""
    if values.ndim == min(_AXES[kind]):
        values = values[:, None]
    elif values.shape[-1] in (1, 3):
        values = np.moveaxis(values, -1, 1)
    elif values.shape[1] not in (1, 3):
        raise UserError(
            f"{name}: these are not {kind}s of 1 or 3 channels",
            got=f"shape {values.shape}",
            expected=f"{ARRAYS[kind]}, where C is 1 or 3",
            fix="drop a fourth channel (alpha) with x[..., :3]"
            + ('; grey video (N, T, H, W) says so with kind="video"' if kind == "image" else ""),
        )
    if values.dtype.kind in "iu" and values.dtype != np.uint8:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 255:
            raise UserError(
                f"{name}: {kind}s of whole numbers must lie in 0..255",
                got=f"{low} to {high}",
                fix="save them as uint8",
            )
        values = values.astype(np.uint8)
    if values.dtype == np.uint8:
        return torch.from_numpy(np.array(values, order="C"))
    return _float_tensor(values, name)


def _labels(labels: np.ndarray | Tensor | Sequence[int], n: int, name: str) -> Tensor | None:
    """Labels (n,) int64, or None where all are -1."""
    values = np.asarray(labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels)
    if values.dtype.kind not in "biuf":
        raise UserError(
            f"{name}: the labels are not numbers",
            got=f"an array of type {values.dtype}",
            expected="whole numbers from 0",
            fix="class_names, labels = np.unique(labels, return_inverse=True)",
        )
    if values.shape != (n,):
        raise UserError(
            f"{name}: the labels do not match the samples",
            got=f"labels of shape {values.shape} for {n} samples",
            expected=f"shape ({n},)",
            fix="one-hot labels become numbers by labels.argmax(1)" if values.ndim == 2 else None,
        )
    if values.dtype.kind == "f":
        broken = ~np.isfinite(values) | (values != np.floor(values))
        if broken.any():
            first = int(broken.argmax())
            raise UserError(
                f"{name}: labels must be whole numbers",
                got=f"{values[first]} at index {first}",
                expected="class numbers from 0; a continuous quantity cannot be a class",
            )
    low, high = int(values.min()), int(values.max())
    if low == high == -1:
        return None
    if low < 0:
        raise UserError(
            f"{name}: labels must not be negative",
            got=f"{low} at index {int(values.argmin())}",
            expected="class numbers from 0 (or -1 for every sample: unlabeled)",
        )
    if high >= max(n, _MOST_CLASSES):
        raise UserError(
            f"{name}: labels must be class numbers",
            got=f"{high}, for {n} samples",
            expected="numbers from 0 to the number of classes less one",
            fix="class_names, labels = np.unique(labels, return_inverse=True)",
        )
    return torch.from_numpy(values.astype(np.int64))
