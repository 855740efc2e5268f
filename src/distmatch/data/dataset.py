"""A data set: raw values in memory or in mapped files, labels, and the scaling to the range of the model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.columns import Column, columns_of, decoded, element_names, is_coded
from distmatch.data.kinds import Kind, kind_of_shape
from distmatch.data.recorded import Recorded
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import LABEL, UNCONDITIONAL, Conditioning, check_conditioning
from distmatch.diffusion.prompts import PromptEncoder

_CHUNK = 4096  # samples scaled at a time when statistics are taken, to bound memory


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one shape, kept as they came.

    Attributes:
        raw: Images (N, C, H, W) or video (N, C, T, H, W), uint8 or float32; or vectors (N, D) or sequences
            (N, L, D), float32 or float64.
        labels: Class of each sample, (N,) int64 in 0..num_classes-1, or None.
        class_names: One name for each class, or ().
        name: What the data are called, for messages and logs.
        scaling: The map to the range of the model and back.
        columns: Of a table, its columns; () for other data.
        conditions: What the samples are conditioned on besides their labels, N rows.
        captions: A text for each sample, or ().
        prompt_encoder: What ``conditions`` were made of the captions by; None where they come from elsewhere.
        recorded: Statistics of the samples from when they were written, which replace passes over all of
            them; None where the samples are in memory.
    """

    raw: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str
    scaling: Scaling
    columns: tuple[Column, ...] = ()
    conditions: Conditioning = UNCONDITIONAL
    captions: Sequence[str] = ()
    prompt_encoder: PromptEncoder | None = None
    recorded: Recorded | None = None

    def __post_init__(self) -> None:
        pixels = self.raw.ndim in (4, 5) and self.raw.dtype in (torch.uint8, torch.float32)
        columns = self.raw.ndim in (2, 3) and self.raw.dtype in (torch.float32, torch.float64)
        if not (pixels if self.scaling.kind == "image" else columns):
            raise UserError(
                f"{self.name}: the samples do not match their scaling",
                got=f"{self.raw.dtype} of shape {tuple(self.raw.shape)}, scaled as {self.scaling.kind}s",
                expected="images (N, C, H, W) or video (N, C, T, H, W), uint8 or float32; vectors (N, D) or "
                "sequences (N, L, D), float32 or float64",
            )
        if self.labels is not None and (
            self.labels.shape != self.raw.shape[:1] or self.labels.dtype != torch.int64
        ):
            raise UserError(
                f"{self.name}: the labels do not match the samples",
                got=f"{self.labels.dtype} of shape {tuple(self.labels.shape)}",
                expected=f"int64 of shape ({len(self.raw)},)",
            )
        check_conditioning(self.conditions, len(self.raw))
        if self.captions and len(self.captions) != len(self.raw):
            raise UserError(
                f"{self.name}: there must be one caption for each sample",
                got=f"{len(self.captions)} captions for {len(self.raw)} samples",
            )
        if LABEL in self.conditions:
            raise UserError(
                f"{self.name}: class labels must be passed as labels",
                got=f"a condition called {LABEL}",
                fix="give the array another name",
            )

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def kind(self) -> Kind:
        """``"vector"``, ``"sequence"``, ``"image"`` or ``"video"``."""
        return kind_of_shape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (D,), (L, D), (C, H, W) or (C, T, H, W)."""
        return tuple(self.raw.shape[1:])

    @cached_property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        if self.labels is None:
            return 0
        return max(len(self.class_names), int(self.labels.max()) + 1)

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) of types, shapes and bytes of samples, labels, conditions; and of captions."""
        digest = hashlib.sha256()
        if self.recorded is not None:
            digest.update(self.recorded.digest.encode())
            if self.labels is not None:  # they may have been renumbered
                digest.update(self.labels.numpy().data)
            return digest.hexdigest()
        conditions = [self.conditions[name] for name in sorted(self.conditions)]
        for part in (self.raw, self.labels, *conditions):
            if part is None:
                digest.update(b"none")
                continue
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().numpy().data)
        for caption in self.captions:
            digest.update(f"{caption}\0".encode())
        return digest.hexdigest()

    def batch(self, indices: Tensor, *, flip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scaled samples and their labels.

        Args:
            indices: Which samples, (B,) int64.
            flip: Which of these to mirror left to right, (B,) bool; images and video only.

        Returns:
            ``x`` (B, *shape), float32 in [-1, 1], and labels (B,) or None, on the device of the data.

        Raises:
            UserError: Vectors or sequences are to be mirrored.
        """
        where = indices.to(self.raw.device)
        x = self.scaling.to_model(self.raw[where] if self.recorded is None else self.recorded.rows(where))
        if flip is not None:
            if self.scaling.kind != "image":
                raise UserError(
                    "only images and video can be mirrored", got=f"{self.name}, which contains {self.kind}s"
                )
            x = torch.where(flip.to(x.device).reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
        return x, None if self.labels is None else self.labels[where]

    @property
    def fields(self) -> set[str]:
        """The names of what its samples are conditioned on."""
        return {*self.conditions, *([LABEL] if self.labels is not None else [])}

    def conditioning(self, indices: Tensor) -> Conditioning:
        """What the samples at ``indices`` (B,) are conditioned on: their labels and further conditions."""
        where = indices.to(self.raw.device)
        fields = dict(self.conditions.index(where))
        return Conditioning(fields if self.labels is None else {LABEL: self.labels[where], **fields})

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest raw value: () of pixels, by column (D,) of vectors and sequences."""
        if self.recorded is not None:
            known = self.recorded.moments
            low, high = (torch.from_numpy(v).to(self.raw.dtype) for v in (known.low, known.high))
            return (low[0], high[0]) if self.scaling.kind == "image" else (low, high)
        if self.scaling.kind == "image":
            return self.raw.min(), self.raw.max()
        rows = self.raw.flatten(0, -2)
        return rows.amin(0), rows.amax(0)

    def constant_columns(self) -> list[str]:
        """Names of the columns of numbers that hold one value only, "column 3" where they have none."""
        if self.scaling.kind != "vector":
            return []
        names = element_names(self.columns or columns_of({}, self.shape[-1]))
        low, high = self.extremes
        same = (low == high).tolist()
        return [name for name, one in zip(names, same, strict=True) if one and name is not None]

    def as_rows(self, x: Tensor) -> Tensor:
        """Samples as these data would hold them: of a table words and whole numbers, no values between.

        Args:
            x: Samples (N, *shape) in model space.

        Returns:
            The same for other data and for tables of real numbers alone; else (N, D) float32 with what
            ``distmatch sample --out x.csv`` writes, in model space.
        """
        if not is_coded(self.columns):
            return x
        raw = decoded(self.columns, self.scaling.to_raw(x).detach().cpu().numpy())
        # In the type of the data, so that equal values become equal: a real word and a sampled one.
        return self.scaling.to_model(torch.from_numpy(raw).to(self.raw.dtype)).to(x.device)

    def std(self) -> float:
        """Standard deviation of all scaled values about their common mean: ``sigma_data`` of EDM."""
        if self.recorded is not None:
            return self.recorded.std(self.scaling)
        total = torch.zeros(2, dtype=torch.float64)
        for raw in self.raw.split(_CHUNK):
            x = self.scaling.to_model(raw).cpu().double()
            total += torch.stack((x.sum(), x.square().sum()))
        mean, square = (total / self.raw.numel()).tolist()
        return math.sqrt(max(square - mean**2, 0.0))

    def subset(self, indices: Tensor) -> Dataset:
        """The samples at ``indices`` (M,), with the scaling and the class names of the whole."""
        where = indices.to(self.raw.device)
        names = self.class_names or tuple(str(k) for k in range(self.num_classes))
        labels = None if self.labels is None else self.labels[where]
        return dataclasses.replace(
            self,
            raw=self.raw[where],
            labels=labels,
            class_names=names,
            conditions=self.conditions.index(where),
            captions=tuple(self.captions[i] for i in where.tolist()) if self.captions else (),
            recorded=None,
        )

    def encoded_by(self, encoder: PromptEncoder) -> Dataset:
        """The same samples, conditioned on what an encoder makes of their captions."""
        if self.prompt_encoder is not None and self.prompt_encoder.fingerprint == encoder.fingerprint:
            return self
        return dataclasses.replace(self, conditions=encoder.encode(self.captions), prompt_encoder=encoder)

    def without_labels(self) -> Dataset:
        """The same samples without labels, conditions and captions."""
        return dataclasses.replace(
            self,
            labels=None,
            class_names=(),
            conditions=UNCONDITIONAL,
            captions=(),
            prompt_encoder=None,
        )
