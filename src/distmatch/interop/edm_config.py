"""What the networks of EDM and EDM2 look like, as plain data, with the names that their checkpoints use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError

SONG, ADM, EDM2 = "song", "adm", "edm2"


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

    architecture: str
    resolution: int
    channels: int
    num_classes: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    embedding: str = "positional"
    channel_mult_noise: int = 1
    residual_encoder: bool = False
    resample_filter: tuple[int, ...] = (1, 1)


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

    resolution: int
    channels: int
    num_classes: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    channels_per_head: int = 64
    dropout: float = 0.0
    resample_filter: tuple[int, ...] = (1, 1)

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
            f"these are not the options of a network of kind {architecture}", got=error
        ) from error
    return config


# Far beyond any published network, and far from what a machine cannot hold.
_LARGEST = 2**20
_MOST_LEVELS, _MOST_TAPS, _MOST_HEIGHTS = 16, 32, 64


def _check(config: AnyConfig) -> None:
    sizes: dict[str, object] = {
        "resolution": config.resolution,
        "channels": config.channels,
        "model_channels": config.model_channels,
        "num_blocks": config.num_blocks,
        "num_classes": config.num_classes,
    }
    for name in ("channel_mult_noise", "channel_mult_emb", "channels_per_head"):
        value = getattr(config, name, None)
        if value is not None or (isinstance(config, EDMConfig) and hasattr(config, name)):
            sizes[name] = value
    lists = {
        "channel_mult": (config.channel_mult, 1, _MOST_LEVELS),
        "attn_resolutions": (config.attn_resolutions, 0, _MOST_HEIGHTS),
        "resample_filter": (config.resample_filter, 2, _MOST_TAPS),
    }
    for name, (values, least, most) in lists.items():
        if not isinstance(values, tuple) or not least <= len(values) <= most:
            raise ValueError(f"{name} is no list of {least} to {most} numbers")
    sizes |= {f"channel_mult[{index}]": value for index, value in enumerate(config.channel_mult)}
    for name, value in sizes.items():
        low = 0 if name == "num_classes" else 1
        if type(value) is not int or not low <= value <= _LARGEST:
            raise ValueError(f"{name} is {str(value)[:40]} instead of a whole number up to {_LARGEST}")
    if not all(type(height) is int for height in config.attn_resolutions):
        raise ValueError("attn_resolutions contains values that are not whole numbers")
    taps = config.resample_filter
    numbers = all(type(tap) in (int, float) and abs(tap) < 1e6 for tap in taps)
    if len(taps) % 2 or not numbers or not sum(taps):
        raise ValueError(f"a resampling filter of {len(taps)} taps: an even number is needed, with a sum")
    if config.resolution % (1 << (len(config.channel_mult) - 1)):
        raise ValueError(f"{config.resolution} pixels cannot be halved {len(config.channel_mult) - 1} times")
    _check_fractions(config)
    if isinstance(config, EDMConfig):
        _check_edm(config)
    elif any(config.model_channels * m % config.channels_per_head for m in config.channel_mult):
        raise ValueError(f"widths that are not divisible into heads of {config.channels_per_head} channels")


def _check_fractions(config: AnyConfig) -> None:
    for name in ("dropout", "label_balance", "concat_balance", "res_balance", "attn_balance"):
        value = getattr(config, name, 0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {str(value)[:40]} instead of a number from 0 to 1")
    limit = getattr(config, "clip_act", None)
    if limit is not None and not (type(limit) in (int, float) and limit > 0):
        raise ValueError(f"clip_act is {str(limit)[:40]}")


def _check_edm(config: EDMConfig) -> None:
    if config.embedding not in ("positional", "fourier"):
        raise ValueError(f"noise embedding {str(config.embedding)[:40]!r}")
    if type(config.residual_encoder) is not bool:
        raise ValueError("residual_encoder is neither true nor false")
    for width in {config.model_channels, *(config.model_channels * m for m in config.channel_mult)}:
        # Normalized in groups of four channels or more, 32 groups at most.
        if width < 4 or width % min(32, width // 4):
            raise ValueError(f"a level of {width} channels, which cannot be normalized in groups")


def config_dict(config: AnyConfig) -> dict[str, Any]:
    """The JSON form of a config; tuples become lists."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return {"architecture": config.architecture, **fields}
