"""Adapters of peft for layers that use their weight in a way of their own. Imported where peft is there."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call


class LowRankWeight(nn.Module, LoraLayer):
    """A layer called with the weight ``W + scaling B A``, whatever it does with it.

    peft adds the output of B A to that of the layer. That is not the same where a layer normalizes its weight
    (EDM2) or resamples as it convolves (EDM), so here the two weights are added.

    Args:
        base_layer: A module whose weight is a parameter ``weight`` (outputs, ...).
        adapter_name: As peft names the adapter.
        config: The configuration of peft.
        r: Rank.
        lora_alpha: The scaling times the rank.
        **kwargs: What else peft tells its layers; not read.
    """

    def __init__(
        self, base_layer: Any, adapter_name: str, config: Any, r: int, lora_alpha: Any, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.weight[0].numel(), module.weight.shape[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What is added to the weight, in its shape."""
        first: Any = self.lora_A[adapter].weight
        last: Any = self.lora_B[adapter].weight
        delta: Any = self.scaling[adapter] * (last @ first)
        shaped: Tensor = delta.view_as(self.get_base_layer().weight)
        return shaped

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer returns with the changed weight."""
        layer: Any = self.get_base_layer()
        weight: Tensor = layer.weight
        for adapter in self.active_adapters:
            weight = (weight + self.get_delta_weight(adapter)).to(weight.dtype)
        found: Tensor = functional_call(layer, {"weight": weight}, (x, *args), kwargs)
        return found
