"""Many small networks of one architecture as one: stacked parameters, and one pass that runs all of them.

Networks of this size cost more calls than arithmetic. As a stack, students of other divergences and seeds
train in a fraction of the time. They are the library's own networks, and none sees another's samples or
gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Stack:
    """Networks as one function of inputs with an axis more, (R, B, ...), and an Adam for each.

    Args:
        networks: Of one architecture.
        lr: Learning rate, after a linear ramp of 100 steps.
        clip: Bound on the norm of each network's gradient.
    """

    def __init__(self, networks: Sequence[nn.Module], lr: float, clip: float = 1.0) -> None:
        self.parameters, self.buffers = stack_module_state(list(networks))
        self.base = copy.deepcopy(networks[0]).to("meta")
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.lr, self.clip, self.steps = lr, clip, 0

    def __call__(self, *inputs: Any, averaged: bool = False, **options: Any) -> Any:
        """The output of network r for the r-th part of the inputs; options are the same for all."""

        def one(parameters: Any, buffers: Any, *each: Any) -> Any:
            return functional_call(self.base, (parameters, buffers), each, options)

        return vmap(one)(self.average if averaged else self.parameters, self.buffers, *inputs)

    def step(self, gradients: Sequence[Tensor], decay: float = 0.0) -> None:
        """An update by the gradients of the stacked parameters, and of the average of all updates."""
        flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
        scale = (self.clip / (flat.norm(dim=1) + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            clipped = gradient * scale.reshape(-1, *[1] * (gradient.ndim - 1))
            # The fused optimizer goes through memory in order, which gradients of vmap may not be in.
            parameter.grad = clipped.contiguous()
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, self.steps / 100)
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
