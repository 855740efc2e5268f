"""Layers that read a shortcut, rewritten as two that are summed, for a quantizer of each half.

The decoder of a U-Net reads cat[h, skip], whose halves differ in range, so that one quantization range for
both is too coarse for one of them. With the weight cut where the input is, W cat[h, skip] + b =
(W_0 h + b) + W_1 skip (Li et al. 2023, "Q-Diffusion"), and each half is a separate layer, with its own weight
and its own input. In exact arithmetic nothing changes.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.nets.unet import UNet, UNetBlock


class SplitLayer(nn.Module):
    """The sum of two layers, each fed by its part of the input's channels. :func:`split_layer` makes it.

    Args:
        first: Reads the channels before ``index``; has the bias, if there is one.
        second: Reads the channels from ``index`` on; has no bias.
        index: Number of channels of the first part.
        dim: Dimension of the channels, counted from the end.
    """

    def __init__(self, first: nn.Module, second: nn.Module, index: int, dim: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.index, self.dim = index, dim

    def forward(self, x: Tensor) -> Tensor:
        """What the layer that was split returns for ``x``."""
        h, skip = x.tensor_split([self.index], dim=self.dim)
        return self.first(h) + self.second(skip)


def split_layer(layer: nn.Conv2d | nn.Linear, index: int) -> SplitLayer:
    """The layer as two that are summed: one for the input channels before ``index``, one for the rest.

    Args:
        layer: A convolution without groups, or a linear layer. It is left as it is; weights are copied.
        index: Where the channels are cut, with at least one on either side.

    Raises:
        UserError: A cut outside the channels, or a convolution in groups, which does not sum over them.
    """
    channels = layer.weight.shape[1]
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise UserError(
            "a convolution in groups cannot be split by its input channels",
            got=f"groups={layer.groups}",
            expected="groups=1",
        )
    if not 0 < index < channels:
        raise UserError(
            "a layer is split between two of its input channels",
            got=index,
            expected=f"a whole number above 0 and below {channels}, its input channels",
        )
    first, second = _part(layer, 0, index), _part(layer, index, channels)
    second.bias = None
    return SplitLayer(first, second, index, -3 if isinstance(layer, nn.Conv2d) else -1)


def split_shortcuts(net: UNet) -> UNet:
    """A copy of a U-Net whose layers that read a shortcut are split where the shortcut begins.

    In the decoder these are ``conv_in`` and ``skip`` of each block with a skip connection. Both cut right
    before the multiplication: the normalization goes over groups of all channels, also groups across the cut,
    and stays on the concatenation, as does the activation.

    The names of the weights change, so load first and rewrite then; a model folder holds the network as it
    was. ``state_dict`` of the copy fits any other copy.

    Args:
        net: The network, not rewritten before.
    """
    changed = copy.deepcopy(net)
    before: nn.Module = changed.middle[-1]
    for block in changed.up:
        if isinstance(block, UNetBlock) and isinstance(before, UNetBlock) and block.resample == "same":
            index = before.conv_out.out_channels
            for name in ("conv_in", "skip"):
                layer = getattr(block, name)
                if isinstance(layer, SplitLayer):
                    raise UserError("the shortcuts of this network are split already")
                setattr(block, name, split_layer(layer, index))
        before = block
    return changed


def _part(layer: nn.Conv2d | nn.Linear, start: int, stop: int) -> nn.Conv2d | nn.Linear:
    """A copy of a layer that reads the input channels ``start`` to ``stop`` only."""
    part = copy.deepcopy(layer)
    weight = layer.weight.detach()[:, start:stop].clone()
    part.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if isinstance(part, nn.Conv2d):
        part.in_channels = stop - start
    else:
        part.in_features = stop - start
    return part
