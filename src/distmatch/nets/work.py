"""How much a network computes, counted without computing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.nets.build import build_net
from distmatch.nets.config import NetConfig
from distmatch.nets.text import TextInput


def network_work(
    config: NetConfig, shape: Sequence[int], num_classes: int, text: TextInput | None = None
) -> tuple[int, int]:
    """The parameters of a network, and the multiply-adds of its layers for one sample, forward.

    Linear layers and convolutions count; the products of attention, a few per cent of a U-Net, do not.

    Args:
        config: The network.
        shape: Shape of one sample.
        num_classes: Number of classes; 0 without.
        text: The text that it takes; None without.
    """
    counted = 0

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        counted += output.numel() * layer.weight[0].numel()

    with torch.device("meta"), torch.no_grad():  # tensors without values: shapes alone are worked out
        net = build_net(config, shape, num_classes, text)
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(count)
        labels = torch.zeros(1, dtype=torch.int64) if num_classes else None
        net(torch.zeros(1, *shape), torch.zeros(1), labels)
    return sum(p.numel() for p in net.parameters()), counted
