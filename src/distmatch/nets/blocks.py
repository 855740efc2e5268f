"""The repeated blocks of a network, and passes that compute their activations again."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distmatch.base.errors import UserError

_RECOMPUTING = "recomputes_its_activations"


def repeated_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a network is a stack of, by name, whatever network it is.

    They are the members of its ``nn.ModuleList`` and ``nn.ModuleDict`` that consist of layers, where all such
    members of a list are of one class. Lists inside them do not count; where the members differ, as the
    levels of a U-Net do, the lists inside them do.
    """
    found: dict[str, nn.Module] = {}
    for name, part in network.named_children():
        members = {f"{name}.{n}": m for n, m in part.named_children() if any(m.children())}
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)) and len({type(m) for m in members.values()}) == 1:
            found |= members
        else:
            found |= {f"{name}.{n}": block for n, block in repeated_blocks(part).items()}
    return found


def recompute_blocks(network: nn.Module) -> None:
    """Makes the blocks of a network keep nothing but their inputs for the backward pass, in place.

    Their activations are computed again when the gradient arrives (Chen et al. 2016, arXiv 1604.06174).
    Gradients are the same. Copies of the network do so too, and passes without gradients are as before.

    Raises:
        UserError: The network has no repeated blocks.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        raise UserError(
            "--checkpointing computes the activations of repeated blocks again, and this network has none",
            got=type(network).__name__,
            expected="blocks in an nn.ModuleList",
            fix="omit it; --accumulate saves memory in any network",
        )
    for block in blocks.values():
        kind: Any = type(block)
        if not hasattr(block, _RECOMPUTING):
            block.__class__ = _recomputing(kind)


@cache
def _recomputing(kind: Any) -> Any:
    """A class of blocks that compute their activations twice; deep copies keep a class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **kwargs)

    members = {"__module__": kind.__module__, _RECOMPUTING: True, "forward": forward}
    return type(kind.__name__, (kind,), members)
