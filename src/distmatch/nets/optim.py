"""Optimizers and learning rates, the same for teachers, students and fake scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmatch.base.ranks import ALONE, Ranks
from distmatch.nets.optimizer import OptimizerSettings
from distmatch.nets.shared import local


def adam(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings, lr: float | None = None
) -> torch.optim.AdamW:
    """AdamW in its fused form, which is one pass over the parameters on CPUs and GPUs alike."""
    learn = list(parameters)
    return torch.optim.AdamW(
        learn,
        lr=settings.lr if lr is None else lr,
        betas=(settings.beta1, settings.beta2),
        eps=1e-8,
        weight_decay=settings.weight_decay,
        fused=not any(p.is_meta for p in learn),  # these get their memory later
    )


def rate(settings: OptimizerSettings, step: int, total: int) -> float:
    """Factor on the learning rate at ``step`` of ``total``: linear ramp, then constant or half a cosine."""
    ramp = settings.lr_rampup
    factor = min(1.0, (step + 1) / ramp) if ramp > 0 else 1.0
    if settings.lr_decay == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
    return factor


def scheduled_step(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    step: int,
    total: int,
    lr: float | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """:func:`clipped_step` at the learning rate of ``step`` of ``total``.

    Args:
        optimizer: Its parameters have their gradients.
        settings: Schedule and bound.
        step: Steps done before.
        total: Length of the run.
        lr: The learning rate that the schedule scales; None takes that of the settings.
        ranks: The processes over which gradients are averaged first.

    Returns:
        The norm of the gradient before it is clipped.
    """
    for group in optimizer.param_groups:
        group["lr"] = (settings.lr if lr is None else lr) * rate(settings, step, total)
    ranks.average_gradients(p for group in optimizer.param_groups for p in group["params"])
    return clipped_step(optimizer, settings.grad_clip)


def moments_to(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Moves Adam's moments to a device, where they are needed for a step; its counters stay."""
    for state in optimizer.state.values():
        state.update({name: value.to(device) for name, value in state.items() if value.ndim})


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clips the gradient (``max_norm`` 0: leaves it alone), steps, clears it; returns the norm before."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = _norm(gradients)
    # On a CPU reading the norm is free; elsewhere it would synchronize with the device.
    if max_norm > 0 and (norm.device.type != "cpu" or norm > max_norm):
        torch._foreach_mul_([local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together; those of shared-out parameters have it over all processes."""
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    shared: Any = [g for g in gradients if isinstance(g, DTensor)]
    norm = nn.utils.get_total_norm(whole)
    if shared:
        of_shared: Any = nn.utils.get_total_norm(shared)
        norm = torch.hypot(norm, of_shared.full_tensor())
    return norm
