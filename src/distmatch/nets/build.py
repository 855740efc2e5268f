"""From a config to a network."""

from __future__ import annotations

from collections.abc import Sequence

from distmatch.base.errors import UserError
from distmatch.nets.config import DiTConfig, MLPConfig, NetConfig, UNetConfig, check_shape, kind_of
from distmatch.nets.dit import DiT
from distmatch.nets.mlp import MLP
from distmatch.nets.text import TextInput
from distmatch.nets.unet import UNet


def build_net(
    config: NetConfig, shape: Sequence[int], num_classes: int, text: TextInput | None = None
) -> MLP | UNet | DiT:
    """Builds a network ``net(x, c_noise, labels=None)`` with fresh weights from torch's global random stream.

    Args:
        config: What to build; the network keeps it as ``net.config``.
        shape: Shape of one sample: ``(D,)``, ``(L, D)``, ``(C, H, W)`` or ``(C, T, H, W)``.
        num_classes: Number of classes; 0 for an unconditional network.
        text: The text that it is conditioned on, a DiT alone; None without.

    Raises:
        UserError: The network cannot take samples of this shape, or text, or the number of classes is
            negative.
    """
    shape = check_shape(shape)
    if type(num_classes) is not int or num_classes < 0:
        raise UserError(
            "the number of classes must be 0 or more", got=repr(num_classes), expected="0, 1, 2, ..."
        )
    if text is not None and not isinstance(config, DiTConfig):
        raise UserError(f"a {kind_of(config)} takes no text", fix="use the dit network")
    if isinstance(config, MLPConfig):
        return MLP(config, shape, num_classes)
    if len(shape) not in ((3,) if isinstance(config, UNetConfig) else (2, 3, 4)):
        images = "(channels, height, width)"
        raise UserError(
            f"a {kind_of(config)} does not support samples of this shape",
            got=f"shape {shape}",
            expected=images
            if isinstance(config, UNetConfig)
            else f"(length, channels), {images} or (channels, frames, height, width)",
            fix="use the dit network for sequences and video"
            if len(shape) > 1
            else "use the mlp network for vectors",
        )
    return (
        UNet(config, shape, num_classes)
        if isinstance(config, UNetConfig)
        else DiT(config, shape, num_classes, text)
    )
