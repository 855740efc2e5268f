"""The map between the units of the data and the range [-1, 1] in which models work, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError

# A real picture set in 0..255 has a bright pixel somewhere. Below these the range is a guess, so we ask.
DARKEST_BYTES = 32
DARKEST_FLOATS = 128

_CENTER = "centre"  # as files of all releases spell it


@dataclass(frozen=True)
class Scaling:
    """The affine map ``model = (raw - center) / half``.

    Attributes:
        kind: ``"image"`` (one center for all pixels of images and video) or ``"vector"`` (one center for each
            column of vectors, or channel of sequences: the last axis).
        center: The raw value that becomes 0; length 1, or one for each column.
        half: The raw distance from ``center`` that becomes 1; same length, never 0.
        rule: In words, how the map was chosen.
        precise: Whether raw values are float64, as float32 could not hold them; model values are float32.
        constant: The columns that hold one value only: ``center``, whatever a model gives there.
    """

    kind: Literal["image", "vector"]
    center: tuple[float, ...]
    half: tuple[float, ...]
    rule: str
    precise: bool = False
    constant: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sane = len(self.center) == len(self.half) >= 1 and (self.kind == "vector" or len(self.half) == 1)
        finite = bool(np.isfinite(self.center).all() and np.isfinite(self.half).all())
        fixed = all(type(k) is int and 0 <= k < len(self.half) for k in self.constant)
        if (
            self.kind not in ("image", "vector")
            or not sane
            or not finite
            or min(self.half) <= 0
            or not fixed
            or (self.kind == "image" and self.constant)
        ):
            raise UserError(
                "this is not a scaling",
                got=f"kind {self.kind!r}, {len(self.center)} centers, {len(self.half)} half ranges",
                expected="finite centers and as many half ranges above zero; one of each for images",
            )

    @classmethod
    def for_images(cls, low: float, high: float, rule: str) -> Scaling:
        """The scaling of images whose black is the raw value ``low`` and whose white is ``high``."""
        return cls("image", ((low + high) / 2,), ((high - low) / 2,), rule)

    @classmethod
    def fit_images(cls, raw: Tensor) -> Scaling:
        """Recognizes the range of images by their type and their smallest and largest value.

        uint8 is 0..255. Floats within [0, 1] are [0, 1]; else within [-1, 1] are [-1, 1]; else within
        [0, 255] and reaching 128 are [0, 255].

        Args:
            raw: Images (N, C, H, W) or video (N, C, T, H, W), uint8 or float.

        Raises:
            UserError: The range is none of these, or so dark that it may be another one.
        """
        return cls.of_range(float(raw.min()), float(raw.max()), raw.dtype == torch.uint8)

    @classmethod
    def of_range(cls, low: float, high: float, whole: bool) -> Scaling:
        """What :meth:`fit_images` finds by the smallest and the largest value.

        Args:
            low: The smallest value.
            high: The largest value.
            whole: Whether they are uint8.

        Raises:
            UserError: As :meth:`fit_images`.
        """
        if whole:
            if high < DARKEST_BYTES:
                raise _dark(high, DARKEST_BYTES)
            return cls.for_images(0, 255, "uint8 images, 0..255")
        if low >= 0 and high <= 1:
            return cls.for_images(0, 1, "float images that lie in [0, 1]")
        if low >= -1 and high <= 1:
            return cls.for_images(-1, 1, "float images that lie in [-1, 1]")
        if low >= 0 and high <= 255:
            if high < DARKEST_FLOATS:
                raise _dark(high, DARKEST_FLOATS)
            return cls.for_images(0, 255, "float images that lie in [0, 255]")
        raise UserError(
            "the range of these images is not supported",
            got=f"values from {low:.6g} to {high:.6g}",
            expected="uint8, or floats in [0, 1], [-1, 1] or [0, 255]",
            fix="scale or clip them to one of these ranges; if they are sequences (N, L, D), say so: "
            'np.savez(path, x=x, kind="sequence")',
        )

    @classmethod
    def fit_vectors(cls, raw: Tensor) -> Scaling:
        """Maps each column of ``raw`` (N, D) or (N, L, D) from its smallest and largest value to [-1, 1].

        A constant column becomes 0, and samples have its value again. Columns in float64 are mapped in
        float64.
        """
        rows = raw.flatten(0, -2)
        low = rows.amin(0).double().cpu().numpy()
        high = rows.amax(0).double().cpu().numpy()
        precise = raw.dtype == torch.float64
        center = low + (high - low) / 2
        if not precise:
            # The center is rounded to float32, in which the data are: else a column of large values with a
            # small spread would lose its place when the center is subtracted.
            center = center.astype(np.float32).astype(np.float64)
        half = np.maximum(high - center, center - low)
        constant = tuple(np.flatnonzero(half == 0).tolist())
        half = np.where(half > 0, half, 1.0)
        rule = "columns, from minimum to maximum"
        return cls("vector", tuple(center.tolist()), tuple(half.tolist()), rule, precise, constant)

    @classmethod
    def identity(cls, dim: int) -> Scaling:
        """Leaves vectors or sequences of ``dim`` columns as they are: for data of an exact teacher."""
        return cls("vector", (0.0,) * dim, (1.0,) * dim, "as they are")

    @classmethod
    def known(cls, about: Mapping[str, Any], shape: Sequence[int]) -> Scaling:
        """That of the data of a saved model; without one vectors and sequences stay, pixels are in [-1, 1].

        Args:
            about: What the model keeps of its data.
            shape: Shape of one sample.

        Raises:
            UserError: A field is missing or is not what it should be.
        """
        if "scaling" in about:
            return cls.from_dict(about["scaling"])
        return cls.identity(shape[-1]) if len(shape) < 3 else cls.for_images(-1.0, 1.0, "model space")

    def _numbers(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """Center and half range, ready to broadcast over ``like``."""
        if self.kind == "image":
            return self.center[0], self.half[0]
        if like.ndim not in (2, 3) or like.shape[-1] != len(self.center):
            raise UserError(
                "vectors of another length than the data",
                got=tuple(like.shape),
                expected=f"(N, {len(self.half)}), or sequences (N, L, {len(self.half)})",
            )
        center, half = (torch.tensor(v, dtype=dtype, device=like.device) for v in (self.center, self.half))
        return center, half

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw values (N, *shape) in the range of the model: float32, in [-1, 1]."""
        dtype = torch.float64 if self.precise or raw.dtype == torch.float64 else torch.float32
        center, half = self._numbers(raw, dtype)
        return ((raw.to(dtype) - center) / half).to(torch.float32)

    def to_raw(self, x: Tensor) -> Tensor:
        """Model values in the units of the data: float32 or, where precise, float64; not clipped."""
        dtype = torch.float64 if self.precise else torch.float32
        center, half = self._numbers(x, dtype)
        return x.to(dtype) * half + center

    def settled(self, x: Tensor) -> Tensor:
        """Samples of a model, in model space, with what it makes of constant columns put back to 0."""
        if not self.constant:
            return x
        constant = set(self.constant)
        moving = [float(k not in constant) for k in range(len(self.half))]
        return x * torch.tensor(moving, dtype=x.dtype, device=x.device)

    def export(self, x: Tensor) -> np.ndarray:
        """What ``distmatch sample`` writes.

        Args:
            x: Model values (N, *shape).

        Returns:
            Images as uint8 in 0..255, clipped, (N, H, W) when grey and (N, H, W, C) otherwise; video in the
            same way as (N, T, H, W, C), whatever C is; vectors (N, D) and sequences (N, L, D) in their
            original units, float32 or, where precise, float64.

        Raises:
            UserError: A value is not finite.
        """
        x = x.detach().to(torch.float32)
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise UserError(
                "samples that are not finite cannot be written",
                got=f"{bad} of {x.numel()} values are NaN or infinite",
                fix="the model diverged: use an earlier checkpoint or a lower learning rate",
            )
        return self.in_units(x.cpu()).contiguous().numpy()

    def in_units(self, x: Tensor) -> Tensor:
        """What :meth:`export` gives, of model values that are finite, as a tensor on their device."""
        if self.kind == "vector":
            return self.to_raw(self.settled(x))
        pixels = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        grey = x.ndim == 4 and x.shape[1] == 1
        return pixels[:, 0] if grey else pixels.permute(0, *range(2, x.ndim), 1)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_dict` gives back an equal object."""
        said = {"kind": self.kind, _CENTER: list(self.center), "half": list(self.half), "rule": self.rule}
        precise = {"precise": True} if self.precise else {}
        return {**said, **precise, **({"constant": list(self.constant)} if self.constant else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scaling:
        """Reads the JSON form.

        Raises:
            UserError: A field is missing or is not what it should be.
        """
        try:
            center, half = (tuple(float(v) for v in values[key]) for key in (_CENTER, "half"))
            precise, constant = values.get("precise") is True, tuple(values.get("constant", ()))
            return cls(values["kind"], center, half, str(values["rule"]), precise, constant)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                "cannot read the scaling of the data",
                got=f"{type(error).__name__}: {error}",
                expected=f"the fields kind, {_CENTER}, half and rule",
                fix="use the config that was saved with the model",
            ) from error


def _dark(high: float, least: int) -> UserError:
    return UserError(
        "the range of these images is unclear",
        got=f"a largest value of {high:.6g}",
        expected=f"0..255 with at least one value of {least} or more, or floats in [0, 1] or [-1, 1]",
        fix=f"divide them by the value of white (perhaps {high:.6g}), as floats",
    )
