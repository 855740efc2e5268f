"""The initial network of student and fake score: the teacher's own, or one fitted to its predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.base.seeds import generator, stream_seed
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.conditioning import LABEL, ConditioningLike, as_conditioning, for_model, spec_of
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.noise import NoiseLevels
from distmatch.interop import check_storable, copied_module
from distmatch.interop.lora import shared_base, with_adapters
from distmatch.losses import denoising_loss, edm_weight
from distmatch.methods.settings import RoleSettings
from distmatch.nets.build import build_net
from distmatch.nets.config import NetConfig, default_config
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.jump import taught_to_jump
from distmatch.nets.optim import adam, scheduled_step
from distmatch.nets.optimizer import OptimizerSettings
from distmatch.nets.shared import without_memory

Draw = Callable[[int], tuple[Tensor, ConditioningLike]]

Network = EDMDenoiser | PredictionDenoiser
"""A denoiser that can be trained and saved: with a built-in network, or with that of a teacher. Any
other module with parameters that is a denoiser itself does too."""


def has_network(teacher: Denoiser) -> TypeGuard[Network]:
    """Whether a teacher is a module with parameters, from which student and fake score can start."""
    return isinstance(teacher, nn.Module) and any(p.is_floating_point() for p in teacher.parameters())


def frozen(teacher: Denoiser, device: torch.device, roles: RoleSettings | None = None) -> Denoiser:
    """A teacher for one run: a copy on its device whose parameters do not learn, or the same formula.

    As the base of adapters it shares the memory of the given teacher, where device and dtype agree.
    """
    if not isinstance(teacher, nn.Module):
        return teacher
    if roles is not None and roles.train == "lora":
        base: Denoiser = shared_base(teacher, device, getattr(torch, roles.base_dtype))
        return base
    copied: Denoiser = copied_module(teacher).to(device).eval().requires_grad_(False)
    return copied


def check_saveable(teacher: object) -> None:
    """Refuses, before anything is trained, a teacher whose students could not be saved.

    Raises:
        UserError: A state of its network is not made of tensors.
    """
    if isinstance(teacher, nn.Module):
        check_storable(teacher)


def starting_network(
    teacher: Denoiser,
    net: NetConfig | None,
    seed: int,
    device: torch.device,
    *,
    roles: RoleSettings | None = None,
    jumps: bool = False,
    hollow: bool = False,
) -> Network:
    """A trainable copy of the teacher, adapters on it, or a fresh network of its shape.

    The autoencoder of a teacher on latents is shared, not copied, and is not trained.

    Args:
        teacher: The teacher.
        net: The fresh network's config. None copies the teacher's network; where it has none, the shape
            decides.
        seed: Seed of a fresh network, and of adapters.
        device: Where it goes.
        roles: How it is made of the teacher's network; None copies it.
        jumps: Whether the network with adapters takes a second noise level, which the base does not.
        hollow: Whether a copy has no memory for its parameters, nor a device.
    """
    if net is None and has_network(teacher):
        if roles is not None and roles.train == "lora":
            alpha, targets = roles.lora_alpha or roles.lora_rank, roles.lora_targets
            extend: Any = taught_to_jump if jumps else None
            return with_adapters(
                teacher, rank=roles.lora_rank, alpha=alpha, targets=targets, seed=seed, extend=extend
            )
        network: Network = copied_module(teacher, without_memory(teacher) if hollow else None)
        if hollow:
            return network.float().eval().requires_grad_(True)
    else:
        if others := set(spec_of(teacher)) - {LABEL}:
            raise UserError(
                "a new network takes class labels only, and this teacher takes another conditioning",
                got=f"a teacher without a network to copy, conditioned on {', '.join(sorted(others))}",
                fix="distil a teacher whose network can be copied",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "network"))
            fresh = build_net(
                net or default_config("auto", teacher.shape, device.type), teacher.shape, teacher.num_classes
            )
        network = EDMDenoiser(
            fresh,
            shape=teacher.shape,
            num_classes=teacher.num_classes,
            sigma_data=teacher.sigma_data,
            sigma_min=teacher.sigma_min,
            sigma_max=teacher.sigma_max,
            noise_unit=2 * teacher.sigma_data,
        )
    # In eval mode: dropout would make samples of another distribution than those of the saved student,
    # and draw from torch's global stream, which no checkpoint holds.
    return network.to(device).float().eval().requires_grad_(True)


def fit_to_teacher(
    network: Network, teacher: Denoiser, draw: Draw, noise: NoiseLevels, steps: int, seed: int
) -> None:
    """Regresses a network on the teacher's own predictions, which are less noisy targets than the data.

    Args:
        network: Changed in place.
        teacher: What it shall predict like.
        draw: Gives n clean samples and what they are conditioned on.
        noise: The levels at which they must agree.
        steps: Optimizer steps of 512 samples.
        seed: Seed of the noise.
    """
    device = next(network.parameters()).device
    gen = generator(seed, "fit", device)
    settings = OptimizerSettings(lr=1e-3, lr_rampup=50, lr_decay="cosine")
    optimizer = adam(network.parameters(), settings)
    with progress(steps, desc="fit to teacher", delay=5.0) as bar:
        for step in range(steps):
            x0, given = draw(512)
            x0 = x0.to(device)
            cond = for_model(teacher, as_conditioning(given)).to(device)
            sigma = noise.sample(len(x0), gen)
            x = x0 + expand(sigma, x0) * torch.randn(x0.shape, generator=gen, device=device)
            with torch.no_grad():
                target = teacher(x, sigma, cond)
            weight = edm_weight(sigma, network.sigma_data)
            loss = denoising_loss(network(x, sigma, cond), target, weight).mean()
            loss.backward()
            scheduled_step(optimizer, settings, step, steps)
            bar.update(1, loss=loss.detach())
