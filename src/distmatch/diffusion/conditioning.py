"""What samples are conditioned on: named tensors with one row for each; class labels are a special case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError

LABEL = "label"
"""The field of class labels, int64 (B,)."""
NULL_LABEL = -1
"""The label of a sample without a class. Networks map it to their own null row or null class."""


class Conditioning(Mapping[str, Tensor]):
    """An immutable mapping from names to batch-first tensors, such as ``label`` or ``encoder_hidden_states``.

    The empty one, :data:`UNCONDITIONAL`, asks for nothing: a denoiser takes its own null conditioning for
    all samples, and all operations on rows return it as it is. Samples without a condition among others that
    have one take rows of :func:`null_conditioning`, see :meth:`where`.

    Args:
        fields: Tensors (B, ...) by name, all with the same number of rows.

    Raises:
        UserError: A field is no tensor with rows, or the numbers of rows differ.
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Tensor] | None = None) -> None:
        given = dict(fields or {})
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                raise UserError(
                    f"the conditioning field '{name}' must be a tensor with one row a sample",
                    got=f"a {type(value).__name__}" if not isinstance(value, Tensor) else "a single number",
                    expected="a tensor of shape (batch, ...)",
                )
        if len({len(value) for value in given.values()}) > 1:
            raise UserError(
                "the fields of a conditioning must have one row for each sample",
                got=", ".join(f"{name}: {len(value)} rows" for name, value in given.items()),
                expected="the same number in all of them",
            )
        self._fields = given

    def __getitem__(self, name: str) -> Tensor:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @classmethod
    def _derived(cls, fields: dict[str, Tensor]) -> Conditioning:
        """Fields that were checked before: steps make many of these."""
        made = cls.__new__(cls)
        made._fields = fields
        return made

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning._derived({name: change(value) for name, value in self._fields.items()})

    # Those of a mapping would compare tensors for truth.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """Names, shapes and dtypes."""
        return (
            f"Conditioning({', '.join(f'{k}={tuple(v.shape)} {v.dtype}' for k, v in self._fields.items())})"
        )

    @property
    def batch_size(self) -> int | None:
        """Number of samples; None for the empty conditioning, which fits any number."""
        return next((len(value) for value in self._fields.values()), None)

    @property
    def label(self) -> Tensor | None:
        """The class labels, (B,) int64; None without."""
        return self._fields.get(LABEL)

    def index(self, rows: slice | Tensor) -> Conditioning:
        """The samples of a slice, a mask (B,) or indices (n,)."""
        return self._each(lambda value: value[rows])

    def expand(self, n: int) -> Conditioning:
        """One sample's conditioning for ``n`` samples.

        Raises:
            UserError: It holds neither one row nor ``n``.
        """
        if self.batch_size not in (None, 1, n):
            raise UserError("there must be one condition, or one a sample", got=self.batch_size, expected=n)
        return self._each(lambda value: value.expand(n, *value.shape[1:]))

    def repeat(self, times: int) -> Conditioning:
        """All samples, ``times`` over: the batch, then the batch again."""
        return self._each(lambda value: torch.cat([value] * times))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Conditioning:
        """The same on another device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """These samples where ``mask`` (B,) is true, those of ``other`` elsewhere.

        Raises:
            UserError: The two have other fields.
        """
        _require_same_fields(self, other)
        return Conditioning._derived(
            {
                name: torch.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, other[name])
                for name, value in self._fields.items()
            }
        )


UNCONDITIONAL = Conditioning()
"""No condition: a denoiser takes its null conditioning for all samples."""

ConditioningLike = Conditioning | Tensor | None
"""What public functions take: a conditioning, int64 class labels (B,), or None for no condition."""


def as_conditioning(value: ConditioningLike) -> Conditioning:
    """A user's argument as a conditioning.

    Args:
        value: A conditioning, class labels (B,), or None for no condition.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(value, Conditioning):
        return value
    if value is None:
        return UNCONDITIONAL
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool:
            raise UserError(
                "class labels must be whole numbers, one for each sample",
                got=f"{tuple(value.shape)}, {value.dtype}",
                expected="(batch,) int64",
            )
        return Conditioning({LABEL: value.long()})
    raise UserError(
        "a conditioning is class labels, a Conditioning, or None",
        got=f"a {type(value).__name__}",
        fix='for example distmatch.Conditioning({"encoder_hidden_states": embedded})',
    )


def labels_of(value: ConditioningLike) -> Tensor | None:
    """The class labels (B,) int64 in a user's argument; None without."""
    return as_conditioning(value).label


def has_condition(conditioning: Conditioning) -> bool | Tensor:
    """Which samples have a condition: all, none, or those (B,) whose label is not the null label."""
    if not conditioning:
        return False
    label = conditioning.label
    return True if label is None or len(conditioning) > 1 else label > NULL_LABEL


def cat(parts: Sequence[Conditioning]) -> Conditioning:
    """The samples of all parts, one part after the other.

    Raises:
        UserError: The parts have different fields.
    """
    for part in parts[1:]:
        _require_same_fields(parts[0], part)
    return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(frozen=True)
class FieldSpec:
    """What a denoiser expects of one field.

    Attributes:
        shape: Shape of one sample's value, without the batch; -1 where any size is fine.
        dtype: Its dtype; any floating dtype represents all of them.
        classes: For labels: how many there are, so that values are in 0..classes-1 or :data:`NULL_LABEL`.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    classes: int = 0


ConditioningSpec = Mapping[str, FieldSpec]
"""The fields that a denoiser takes, by name."""


def label_spec(num_classes: int) -> ConditioningSpec:
    """The spec of a model of ``num_classes`` classes; empty for 0."""
    return {LABEL: FieldSpec((), torch.int64, num_classes)} if num_classes else {}


def spec_of(denoiser: Any) -> ConditioningSpec:
    """The fields that a denoiser takes: its ``conditioning_spec``, or labels of its ``num_classes``."""
    own: ConditioningSpec | None = getattr(denoiser, "conditioning_spec", None)
    return label_spec(denoiser.num_classes) if own is None else own


def for_model(denoiser: Any, conditioning: Conditioning) -> Conditioning:
    """The part of a conditioning that a model takes: none for an unconditional one."""
    spec = spec_of(denoiser)
    if set(conditioning) <= set(spec):
        return conditioning
    return Conditioning({name: value for name, value in conditioning.items() if name in spec})


def null_conditioning(denoiser: Any, n: int, device: torch.device | str = "cpu") -> Conditioning:
    """What "no condition" is for a denoiser, for ``n`` samples: null labels, or its ``null_conditioning(n)``.

    Args:
        denoiser: A denoiser. One that takes more than labels has a method ``null_conditioning(n)``: rows of
            a learned embedding, of an embedded empty prompt.
        n: Number of samples.
        device: Where the result goes.
    """
    own = getattr(denoiser, "null_conditioning", None)
    if own is not None:
        found: Conditioning = own(n)
        return found.to(device)
    return null_labels(spec_of(denoiser), n, device)


def example_conditioning(denoiser: Any, n: int, device: torch.device | str = "cpu") -> Conditioning:
    """Some conditioning that a denoiser takes, for trial calls: class 0, and zeros of the smallest size.

    Of one that takes more than labels its null conditioning, where it has one: not all zeros can be called.
    """
    spec = spec_of(denoiser)
    if any(not field.classes for field in spec.values()):
        with suppress(UserError):  # it has none
            null = null_conditioning(denoiser, n, device)
            if null.keys() == spec.keys():
                return null
    shapes = {name: (n, *(max(size, 1) for size in field.shape)) for name, field in spec.items()}
    found = {name: torch.zeros(shapes[name], dtype=spec[name].dtype, device=device) for name in spec}
    return Conditioning(found)


def null_labels(spec: ConditioningSpec, n: int, device: torch.device | str = "cpu") -> Conditioning:
    """The null label in every field of labels, for ``n`` samples."""
    labels = torch.full((n,), NULL_LABEL, dtype=torch.int64, device=device)
    return Conditioning({name: labels for name, field in spec.items() if field.classes})


def conditioning_for(model: object, value: ConditioningLike, n: int) -> Conditioning:
    """A user's argument as a conditioning of ``n`` samples that a model takes.

    Raises:
        UserError: As :func:`as_conditioning` and :func:`check_conditioning`.
    """
    conditioning = as_conditioning(value)
    check_conditioning(conditioning, n, spec_of(model))
    return conditioning


def check_conditioning(conditioning: Conditioning, n: int, spec: ConditioningSpec | None = None) -> None:
    """Refuses a conditioning that does not fit the samples or the model.

    Args:
        conditioning: What the samples are conditioned on.
        n: Number of samples.
        spec: The fields that the model takes; None checks the number of rows alone.

    Raises:
        UserError: Another number of rows, or fields, shapes or dtypes that the model does not take. Labels
            out of range are found on the CPU only, where looking at them waits for nothing.
    """
    rows = conditioning.batch_size
    if rows is not None and rows != n:
        raise UserError(
            "there must be one condition for each sample",
            got=f"{rows} for {n} samples",
            expected=f"{n}, or None for no condition",
        )
    if spec is None or not conditioning:
        return
    if set(conditioning) != set(spec):
        raise UserError(
            "this model takes another conditioning",
            got=", ".join(conditioning),
            expected=", ".join(spec) or "none: it is unconditional",
        )
    for name, field in spec.items():
        _check_field(name, conditioning[name], field)


def _check_field(name: str, value: Tensor, field: FieldSpec) -> None:
    shape = tuple(value.shape[1:])
    fits = len(shape) == len(field.shape)
    fits = fits and all(wanted in (-1, size) for wanted, size in zip(field.shape, shape, strict=True))
    if not fits or value.dtype.is_floating_point != field.dtype.is_floating_point:
        wanted = ", ".join("any" if size < 0 else str(size) for size in field.shape)
        raise UserError(
            f"the condition '{name}' does not match this model",
            got=f"{tuple(value.shape)}, {value.dtype}",
            expected=f"(batch{', ' if wanted else ','}{wanted}), {field.dtype}",
        )
    if field.classes and value.device.type == "cpu" and value.numel():
        low, high = int(value.min()), int(value.max())
        if low < NULL_LABEL or high >= field.classes:
            raise UserError(
                "class labels are out of range",
                got=f"values {low} to {high}",
                expected=f"0 to {field.classes - 1}, or {NULL_LABEL} for no class",
            )


def _require_same_fields(one: Conditioning, other: Conditioning) -> None:
    if set(one) != set(other):
        raise UserError(
            "conditionings can be combined only where they have the same fields",
            got=f"{', '.join(one) or 'none'} and {', '.join(other) or 'none'}",
            fix="use rows of null_conditioning(denoiser, n) for unconditional samples",
        )
