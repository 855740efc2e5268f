"""What a network looks like, as plain data. It must stay free of torch: the command line imports it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError, unknown_name


def _positive(net: str, **values: object) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise UserError(
                f"{net}: {name} must be a positive whole number",
                got=repr(value),
                expected="1, 2, 3, ...",
                fix=f"set {name} to a positive whole number",
            )


def _dropout(net: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 <= value < 1:  # type: ignore[operator]
        raise UserError(
            f"{net}: dropout is the fraction of activations set to zero in training",
            got=repr(value),
            expected="0 <= dropout < 1",
            fix="use 0 for no dropout",
        )


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A residual multilayer perceptron on flattened samples of any shape: for vectors and tiny images.

    Attributes:
        width: Hidden units.
        depth: Residual blocks.
        dropout: Dropout inside the blocks while training.
    """

    width: int = 256
    depth: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _positive("mlp", width=self.width, depth=self.depth)
        _dropout("mlp", self.dropout)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A convolutional U-Net for images.

    Attributes:
        width: Channels at full resolution, at least 4.
        multipliers: Channels of each level in units of ``width``; every further level halves the resolution.
        blocks: Residual blocks per level.
        attention: Levels with self-attention, 0 the finest; negative numbers count from the coarsest, so
            that -1 is valid for any number of levels. The middle always has attention.
        dropout: Dropout inside the blocks while training.
    """

    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (-1,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _positive("unet", width=self.width, blocks=self.blocks)
        _dropout("unet", self.dropout)
        if self.width < 4:
            raise UserError(
                "unet: width is too small for group normalization", got=self.width, expected=">= 4"
            )
        if not isinstance(self.multipliers, tuple) or not self.multipliers:
            raise UserError(
                "unet: multipliers must be a tuple", got=repr(self.multipliers), expected="(1, 2, 2)"
            )
        for value in self.multipliers:
            _positive("unet", multipliers=value)
        levels = len(self.multipliers)
        ok = isinstance(self.attention, tuple) and all(
            type(level) is int and -levels <= level < levels for level in self.attention
        )
        if not ok:
            raise UserError(
                f"unet: attention names a resolution that {levels} multipliers do not have",
                got=repr(self.attention),
                expected=f"a tuple of levels from {-levels} to {levels - 1}",
                fix="use (-1,) for the coarsest level, () for the middle only",
            )

    @property
    def attention_levels(self) -> frozenset[int]:
        """The levels with attention, all counted from 0."""
        return frozenset(level % len(self.multipliers) for level in self.attention)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A diffusion transformer on patches of sequences, images or video.

    Attributes:
        patch: Side of a patch along every axis: members of a sequence, pixels, frames and pixels.
        width: Size of a token; a multiple of 4 (sine-cosine positions) and of ``heads``.
        depth: Transformer blocks.
        heads: Attention heads.
    """

    patch: int = 2
    width: int = 192
    depth: int = 6
    heads: int = 3

    def __post_init__(self) -> None:
        _positive("dit", patch=self.patch, width=self.width, depth=self.depth, heads=self.heads)
        if self.width % 4 or self.width % self.heads:
            step = math.lcm(4, self.heads)
            raise UserError(
                "dit: the width is not divisible by the number of heads",
                got=f"width {self.width}, heads {self.heads}",
                expected=f"a multiple of {step}",
                fix=f"set width to {max(1, round(self.width / step)) * step}",
            )


NetConfig: TypeAlias = MLPConfig | UNetConfig | DiTConfig

_MLP, _UNET, _DIT = "mlp", "unet", "dit"
SMALL_UNET, SMALL_DIT = "unet-small", "dit-small"
"""Choices of a U-Net and a DiT, not kinds of their own: other defaults that :func:`default_config` has."""
KINDS: tuple[str, ...] = (_MLP, _UNET, _DIT)
_CHOICES = (*KINDS, SMALL_UNET, SMALL_DIT)
_MOST_TOKENS = 1024  # of a sequence or video, by default


def config_class(kind: object) -> type[MLPConfig] | type[UNetConfig] | type[DiTConfig]:
    """The config class of a kind of network.

    Raises:
        UserError: There is no such kind.
    """
    match kind:
        case "mlp":
            return MLPConfig
        case "unet":
            return UNetConfig
        case "dit":
            return DiTConfig
    raise unknown_name("network", kind, KINDS)


def kind_of(config: NetConfig) -> str:
    """The name of a config's kind: ``"mlp"``, ``"unet"`` or ``"dit"``."""
    match config:
        case MLPConfig():
            return _MLP
        case UNetConfig():
            return _UNET
        case DiTConfig():
            return _DIT


def blocks(config: NetConfig) -> int:
    """How many blocks a network of this config has, at least; each of them has parameters."""
    if isinstance(config, UNetConfig):
        return config.blocks * len(config.multipliers)
    return config.depth


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Checks the shape of one sample, of one to four axes, and returns it as a tuple.

    Raises:
        UserError: It is none.
    """
    whole = all(type(side) is int and side > 0 for side in shape)
    if not whole or len(shape) not in (1, 2, 3, 4):
        raise UserError(
            "a network needs samples that are vectors, sequences, images or video",
            got=f"shape {tuple(shape)}",
            expected="(D,), (length, channels), (channels, height, width) or "
            "(channels, frames, height, width), all positive",
        )
    return tuple(shape)


def auto_kind(shape: Sequence[int], device: str, *, text: bool = False) -> str:
    """The meaning of ``auto``.

    An MLP for vectors and for grey images of at most 8x8 pixels, a U-Net for other images, a DiT for
    sequences, video and samples with captions; on a CPU the small ones. That is a rule and no timing, so
    that it is the same on every CPU.

    Args:
        shape: Shape of one sample.
        device: Type of the device that it is trained on: ``"cpu"``, ``"cuda"``, ...
        text: Whether the samples have captions.
    """
    shape = check_shape(shape)
    if text and len(shape) > 1:
        return SMALL_DIT if device == "cpu" else _DIT
    if len(shape) == 1 or (len(shape) == 3 and shape[0] == 1 and max(shape[1:]) <= 8):
        return _MLP
    small = device == "cpu"
    if len(shape) == 3:
        return SMALL_UNET if small else _UNET
    return SMALL_DIT if small else _DIT


def default_config(kind: str, shape: Sequence[int], device: str) -> NetConfig:
    """A network of the given kind that suits samples of the given shape.

    Args:
        kind: ``"mlp"``, ``"unet"``, ``"unet-small"``, ``"dit"``, ``"dit-small"``, or ``"auto"``, see
            :func:`auto_kind`.
        shape: Shape of one sample.
        device: Type of the device that it is trained on.

    Raises:
        UserError: Unknown kind, or a shape that no network takes.
    """
    shape = check_shape(shape)
    if kind == "auto":
        kind = auto_kind(shape, device)
    elif kind not in _CHOICES:
        raise unknown_name("network", kind, ("auto", *_CHOICES))
    if kind in (_UNET, SMALL_UNET) and len(shape) == 3:
        # Halve until the coarsest map is about 8x8: there attention over all pixels is cheap.
        halvings = max(1, math.ceil(math.log2(max(shape[1:]) / 8)))
        return _small_unet(halvings) if kind == SMALL_UNET else UNetConfig(multipliers=(1,) + (2,) * halvings)
    if kind in (_DIT, SMALL_DIT):
        small = {"width": 96, "depth": 4} if kind == SMALL_DIT else {}
        return DiTConfig(patch=_patch(shape), **small)
    return config_class(_UNET if kind == SMALL_UNET else kind)()


def _patch(shape: tuple[int, ...]) -> int:
    """The patch of a DiT: 2 for images; of a sequence or video one that leaves at most 1024 tokens."""
    if len(shape) not in (2, 4):
        return 2
    sides, patch = (shape[:1], 1) if len(shape) == 2 else (shape[1:], 2)
    while math.prod(-(-side // patch) for side in sides) > _MOST_TOKENS:
        patch *= 2
    return patch


def _small_unet(halvings: int) -> UNetConfig:
    """A U-Net with 24 channels at 32 pixels or less and 48 below; larger maps have half as many each time.

    So the work grows little with the size of the image: 0.13 billion multiply-adds for 28x28, 0.26 for 64x64.
    """
    width = max(6, 24 >> max(0, halvings - 2))
    return UNetConfig(
        width=width, blocks=1, multipliers=tuple(min(2**k, 48 // width) for k in range(halvings + 1))
    )


def to_dict(config: NetConfig) -> dict[str, Any]:
    """The JSON form of a config: its fields and ``"kind"``; tuples become lists."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return {"kind": kind_of(config), **fields}


def from_dict(values: Mapping[str, Any]) -> NetConfig:
    """The config that :func:`to_dict` described; an omitted field has its default.

    Raises:
        UserError: Unknown kind or field, or a value out of range.
    """
    kind = values.get("kind")
    cls = config_class(kind)
    known = [field.name for field in dataclasses.fields(cls)]
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key != "kind"
    }
    for key in arguments:
        check_name(f"{kind} option", key, known)
    return cls(**arguments)
