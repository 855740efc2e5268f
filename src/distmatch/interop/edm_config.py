"""What the networks of EDM and EDM2 look like, as plain data, with the names that their checkpoints use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.base.rules import Rule, check_rules

SONG, ADM, EDM2 = "song", "adm", "edm2"

_LARGEST = 2**20  # far beyond any published network, and far from what a machine cannot hold


def _whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and low <= value <= _LARGEST


def _number(value: Any, low: float = -1e6, high: float = 1e6) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _list_of(fits: Callable[[Any], bool], least: int, most: int) -> Rule:
    return Rule(
        f"must be a list of {least} to {most} numbers in range",
        lambda values: isinstance(values, tuple) and least <= len(values) <= most and all(map(fits, values)),
    )


Size = Annotated[int, Rule(f"must be a whole number from 1 to {_LARGEST}", _whole)]
OptionalSize = Annotated[int | None, Rule("must be a positive number", lambda v: v is None or _whole(v))]
Classes = Annotated[int, Rule("must be a whole number from 0", lambda v: _whole(v, 0))]
Fraction = Annotated[float, Rule("must be a number from 0 to 1", lambda v: _number(v, 0, 1))]
Flag = Annotated[bool, Rule("must be true or false", lambda v: type(v) is bool)]
Limit = Annotated[float | None, Rule("must be positive", lambda v: v is None or (_number(v) and v > 0))]
Multipliers = Annotated[tuple[int, ...], _list_of(_whole, 1, 16)]
Heights = Annotated[tuple[int, ...], _list_of(lambda v: type(v) is int, 0, 64)]
Taps = Annotated[tuple[int, ...], _list_of(_number, 2, 32)]


@dataclass(frozen=True, kw_only=True)
class EDMConfig:
    """A U-Net of EDM (Karras et al. 2022): DDPM++ or NCSN++ (``song``), or that of ADM (``adm``).

    Attributes:
        architecture: ``"song"`` (Song et al. 2021) or ``"adm"`` (Dhariwal & Nichol 2021).
        resolution: Height and width of an image; names of the layers depend on it.
        channels: Channels of an image.
        num_classes: Number of classes; 0 when unconditional.
        model_channels: Channels in units of which the levels are given.
        channel_mult: Channels of each level in units of ``model_channels``, finest first.
        channel_mult_emb: Size of the conditioning vector, in the same units.
        num_blocks: Residual blocks per level.
        attn_resolutions: Heights at which blocks have attention.
        dropout: Dropout in the blocks, in training mode only.
        embedding: Of the noise level: ``"positional"`` (DDPM++, ADM) or ``"fourier"`` (NCSN++).
        channel_mult_noise: Size of that embedding: 1, or 2 for NCSN++.
        residual_encoder: Whether each level also sees the image itself, made smaller (NCSN++).
        resample_filter: Taps of the filter for halving and doubling: 1,1 or (NCSN++) 1,3,3,1.
    """

    flags: ClassVar[bool] = False

    architecture: str
    resolution: Size
    channels: Size
    num_classes: Classes = 0
    model_channels: Size = 128
    channel_mult: Multipliers = (1, 2, 2, 2)
    channel_mult_emb: Size = 4
    num_blocks: Size = 4
    attn_resolutions: Heights = (16,)
    dropout: Fraction = 0.1
    embedding: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: Size = 1
    residual_encoder: Flag = False
    resample_filter: Taps = (1, 1)


@dataclass(frozen=True, kw_only=True)
class EDM2Config:
    """The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, figure 21).

    Attributes:
        resolution: Height and width of an image or latent.
        channels: Its channels.
        num_classes: Number of classes; 0 when unconditional.
        model_channels: Channels in units of which the levels are given.
        channel_mult: Channels of each level, finest first.
        channel_mult_noise: Size of the noise embedding; None: that of the finest level.
        channel_mult_emb: Size of the conditioning vector; None: the largest of the levels.
        num_blocks: Residual blocks per level.
        attn_resolutions: Heights at which blocks have attention.
        label_balance: Share of the class in the sum with the noise level.
        concat_balance: Share of the skip connection in a concatenation.
        res_balance: Share of the residual branch in a block.
        attn_balance: Share of the attention branch in a block.
        clip_act: Activations are kept within plus and minus this; None: not at all.
        channels_per_head: Channels of one attention head.
        dropout: Dropout in the blocks, in training mode only.
        resample_filter: Taps of the filter for halving and doubling.
    """

    flags: ClassVar[bool] = False

    resolution: Size
    channels: Size
    num_classes: Classes = 0
    model_channels: Size = 192
    channel_mult: Multipliers = (1, 2, 3, 4)
    channel_mult_noise: OptionalSize = None
    channel_mult_emb: OptionalSize = None
    num_blocks: Size = 3
    attn_resolutions: Heights = (16, 8)
    label_balance: Fraction = 0.5
    concat_balance: Fraction = 0.5
    res_balance: Fraction = 0.3
    attn_balance: Fraction = 0.3
    clip_act: Limit = 256.0
    channels_per_head: Size = 64
    dropout: Fraction = 0.0
    resample_filter: Taps = (1, 1)

    @property
    def architecture(self) -> str:
        """``"edm2"``."""
        return EDM2


AnyConfig: TypeAlias = EDMConfig | EDM2Config


@dataclass(frozen=True)
class Stage:
    """One entry of an encoder or decoder.

    Attributes:
        name: Its name in the checkpoint.
        inputs: Channels in; in the decoder with the skip connection that is joined before it.
        outputs: Channels out.
        attention: Whether it has attention.
        resample: ``"same"``, ``"down"`` or ``"up"``.
        joins: Whether a skip connection is joined before it.
    """

    name: str
    inputs: int
    outputs: int
    attention: bool = False
    resample: str = "same"
    joins: bool = False


def plan(config: AnyConfig) -> tuple[list[Stage], list[Stage]]:
    """The stages of encoder and decoder. The first of the encoder is a plain convolution from the image.

    The three architectures differ in two details only: DDPM++ starts with ``model_channels`` whatever the
    first level has, and in its decoder only the last block of a level attends.
    """
    song = config.architecture == SONG
    levels = [config.model_channels * multiplier for multiplier in config.channel_mult]
    first = config.model_channels if song else levels[0]
    image = config.channels + (1 if isinstance(config, EDM2Config) else 0)
    encoder, kept = [], []
    width = image
    for level, outputs in enumerate(levels):
        height = config.resolution >> level
        if level == 0:
            encoder.append(Stage(f"{height}x{height}_conv", image, first))
            width = first
        else:
            encoder.append(Stage(f"{height}x{height}_down", width, width, resample="down"))
        kept.append(width)
        for index in range(config.num_blocks):
            attends = height in config.attn_resolutions
            encoder.append(Stage(f"{height}x{height}_block{index}", width, outputs, attends))
            width = outputs
            kept.append(width)
    decoder = []
    for level in reversed(range(len(levels))):
        height, outputs = config.resolution >> level, levels[level]
        if level == len(levels) - 1:
            decoder.append(Stage(f"{height}x{height}_in0", width, width, attention=True))
            decoder.append(Stage(f"{height}x{height}_in1", width, width))
        else:
            decoder.append(Stage(f"{height}x{height}_up", width, width, resample="up"))
        for index in range(config.num_blocks + 1):
            attends = height in config.attn_resolutions and (not song or index == config.num_blocks)
            inputs = width + kept.pop()
            decoder.append(Stage(f"{height}x{height}_block{index}", inputs, outputs, attends, joins=True))
            width = outputs
    return encoder, decoder


# Names that the checkpoints use for what is called otherwise here, and what they say that needs no field.
_RENAMED = {
    "img_resolution": "resolution",
    "img_channels": "channels",
    "in_channels": "channels",
    "label_dim": "num_classes",
    "embedding_type": "embedding",
}
_IGNORED = frozenset(
    {
        "use_fp16",
        "model_type",
        "out_channels",
        "augment_dim",
        "label_dropout",
        "logvar_channels",
        "sigma_data",
    }
    | {"sigma_min", "sigma_max", "beta_d", "beta_min", "M", "epsilon_t", "decoder_type"}
)


def from_arguments(architecture: str, arguments: Mapping[str, Any]) -> AnyConfig:
    """The config for the arguments that a checkpoint's network was built with.

    Args:
        architecture: ``"song"``, ``"adm"`` or ``"edm2"``.
        arguments: By the names of the checkpoint.

    Raises:
        UserError: It uses an option that no published network has, or one that is not known.
    """
    given = dict(arguments)
    encoder = given.pop("encoder_type", "standard")
    if encoder not in ("standard", "residual") or given.get("decoder_type", "standard") != "standard":
        raise UserError(
            "this variant of the U-Net is not supported",
            got=f"encoder {encoder!r}, decoder {given.get('decoder_type', 'standard')!r}",
            expected="a standard or residual encoder and a standard decoder, as DDPM++ and NCSN++ have",
        )
    fields: dict[str, Any] = {}
    if encoder == "residual":
        fields["residual_encoder"] = True
    for name, value in given.items():
        if name not in _IGNORED:
            fields[_RENAMED.get(name, name)] = tuple(value) if isinstance(value, (list, tuple)) else value
    if architecture == ADM:
        # What ADM takes where DDPM++ takes something else.
        defaults = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3}
        fields = {**defaults, "attn_resolutions": (32, 16, 8), **fields}
    return config_from({"architecture": architecture, **fields})


def config_from(values: Mapping[str, Any]) -> AnyConfig:
    """The config that :func:`config_dict` described.

    Raises:
        UserError: Unknown architecture or field, a field missing or out of range.
    """
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    architecture = fields.get("architecture")
    check_name("architecture", architecture, (SONG, ADM, EDM2))
    cls: type[EDMConfig] | type[EDM2Config] = EDMConfig
    if architecture == EDM2:
        cls = EDM2Config
        del fields["architecture"]
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        check_name(f"option of the {architecture} network", name, known)
    try:
        config = cls(**fields)
        _check(config)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"these are not the options of a network of kind {architecture}", got=str(error)[:300]
        ) from error
    return config


def _check(config: AnyConfig) -> None:
    check_rules(config)
    if len(config.resample_filter) % 2 or not sum(config.resample_filter):
        raise ValueError("resample_filter needs an even number of taps, whose sum is not 0")
    if config.resolution % (1 << (len(config.channel_mult) - 1)):
        raise ValueError(f"{config.resolution} pixels cannot be halved {len(config.channel_mult) - 1} times")
    widths = [config.model_channels * multiplier for multiplier in (1, *config.channel_mult)]
    if isinstance(config, EDM2Config):
        if any(width % config.channels_per_head for width in widths[1:]):
            raise ValueError(f"widths not divisible into heads of {config.channels_per_head} channels")
    # Normalized in groups of four channels or more, 32 groups at most.
    elif any(width < 4 or width % min(32, width // 4) for width in widths):
        raise ValueError(f"levels of {widths} channels, which cannot be normalized in groups")


def config_dict(config: AnyConfig) -> dict[str, Any]:
    """The JSON form of a config; tuples become lists."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return {"architecture": config.architecture, **fields}
