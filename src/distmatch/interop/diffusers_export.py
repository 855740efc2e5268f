"""Students with a network of diffusers as a folder that a stock pipeline of diffusers samples in one step.

Stock pipelines have schedulers of their own, so the constants of the student's one call are put where they
fit: into a scheduler whose single step has the right share of the noise, into the weights of the first and
last layer, and into the timestep embedding layer, which then represents the student's time for any input.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_folder, atomic_write, check_model_folder
from distmatch.interop.card import card_of
from distmatch.interop.diffusers_net import UNET, DiffusersNet
from distmatch.interop.frozen import Call, Portable, StudentLike
from distmatch.interop.latents import VAEDecoder
from distmatch.interop.optional import import_diffusers
from distmatch.nets.saved import CARD

TOLERANCE = 1e-5
_PARTS = ("model_index.json", "unet", "transformer", "scheduler", "vae", CARD)
_INSTEAD = "export it with --to onnx, or --to safetensors"
_LEAST_SPREAD = 2.0**-12


def export_diffusers(
    student: StudentLike, folder: str | os.PathLike[str], *, metrics: Mapping[str, Any] | None = None
) -> float:
    """Writes a student as a pipeline, which ``DiffusionPipeline.from_pretrained`` loads without distmatch.

    A ``UNet2DModel`` becomes a ``ConsistencyModelPipeline``, with or without classes; a
    ``DiTTransformer2DModel`` with its autoencoder becomes a ``DiTPipeline``.

    Args:
        student: A student of one call whose network is one of diffusers.
        folder: The folder to write; an earlier export in it is replaced.
        metrics: The content of ``metrics.json``, for the card.

    Returns:
        The largest difference from the student that was found, in units of model space.

    Raises:
        UserError: No stock pipeline samples such a student exactly, or the folder holds something else.
    """
    package = import_diffusers()
    _check(student)
    folder = Path(folder)
    check_model_folder(folder, _PARTS)
    portable = Portable(student)
    net: DiffusersNet = portable.student.denoiser.net
    decoder: Any = getattr(student.denoiser, "decoder", None)
    with torch.random.fork_rng(devices=[]):  # a new network is filled with random numbers first
        if net.kind == UNET:
            pipeline = _consistency_pipeline(package, net, portable.calls[0], student.shape[1])
        else:
            pipeline = _dit_pipeline(package, net, portable.calls[0], decoder)
    about = student.description()
    usage = _usage(net.kind, student.num_classes)
    card = card_of(student.denoiser, about, usage=usage, library="diffusers", metrics=metrics)
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        difference = _difference(pipeline, portable, temporary)
        atomic_write(temporary / CARD, card)
    return difference


def _check(student: StudentLike) -> None:
    """Refuses a student that no stock pipeline samples exactly."""
    net = getattr(student.denoiser, "net", None)
    if not isinstance(net, DiffusersNet):
        raise UserError(
            "only a student of a teacher of diffusers can become a pipeline of diffusers",
            got=f"a network of class {type(net).__name__}, for whose layers diffusers has no model class",
            expected="a network of diffusers, as a UNet2DModel",
            fix=_INSTEAD,
        )
    if len(student.sigmas) > 1:
        raise UserError(
            "stock pipelines of diffusers re-noise at other noise levels than this student",
            got=f"{len(student.sigmas)} calls",
            expected="1 call",
            fix=_INSTEAD,
        )
    if not student.from_noise:
        raise UserError(
            "stock pipelines of diffusers start from noise, and this student from stored latents",
            fix=_INSTEAD,
        )
    decoder = getattr(student.denoiser, "decoder", None)
    config = net.model.config
    reason = _unfit_unet(config, decoder) if net.kind == UNET else _unfit_dit(config, decoder)
    if student.shape[1] != student.shape[2]:
        reason = f"{student.shape[1]} x {student.shape[2]} pixels, and the stock pipeline draws squares"
    elif net.kind != UNET and student.shape[1] != config.sample_size:
        reason = f"{student.shape[1]} pixels a side, and a network that states {config.sample_size}"
    if reason:
        raise UserError("this student fits no stock pipeline of diffusers", got=reason, fix=_INSTEAD)


def _unfit_unet(config: Any, decoder: Any) -> str:
    """Why a U-Net fits no stock pipeline; '' where it does."""
    if decoder is not None:
        return "a U-Net on latents, and no stock pipeline decodes the latents of a UNet2DModel after one step"
    if config.center_input_sample:
        return "center_input_sample, which prevents merging the scale of the input into the first layer"
    blocks = (*config.down_block_types, *config.up_block_types)
    if any("Skip" in block for block in blocks):
        return "skip blocks, through which the input passes by the first and last layer"
    return ""


def _unfit_dit(config: Any, decoder: Any) -> str:
    """Why a transformer fits no stock pipeline; '' where it does."""
    if not isinstance(decoder, VAEDecoder):
        return "a transformer on pixels, and DiTPipeline always decodes latents"
    stated = float(decoder.vae.config.scaling_factor)
    if decoder.unit_pixels or set(decoder.shift) != {0.0} or set(decoder.scale) != {stated}:
        return "latents with a shift or a scale for each channel, which DiTPipeline does not support"
    return ""


def _consistency_pipeline(package: Any, net: DiffusersNet, call: Call, side: int) -> Any:
    """The pipeline of consistency models: one step by default, with classes or without.

    Its scheduler starts from S z, shows the network S z / sqrt(S^2 + d^2), and with ``sigma_min = 0`` returns
    ``d^2 / (S^2 + d^2) S z + S d / sqrt(S^2 + d^2) F``. S is twice the student's level: then d = S is the
    share of a student that predicts noise, and both are the same number in float32, without rounding.
    """
    start = 2 * call.sigma
    share = call.skip / 2
    # A student that predicts samples keeps nothing of the noise. Here it keeps 2^-24 / S of it, which is lost
    # in the rounding of float32.
    spread = max(start * math.sqrt(share / (1 - share)), _LEAST_SPREAD)
    scheduler = package.CMStochasticIterativeScheduler(
        num_train_timesteps=2, sigma_min=0.0, sigma_max=start, sigma_data=spread, rho=1.0, clip_denoised=False
    )
    scheduler.set_timesteps(1)
    shown, gain = start / math.hypot(start, spread), start * spread / math.hypot(start, spread)
    old = net.model
    config = {key: value for key, value in old.config.items() if not key.startswith("_")}
    config |= {"out_channels": net.channels, "time_embedding_type": "positional", "sample_size": side}
    unet = type(old)(**config)
    tensors = old.state_dict()
    factor = torch.tensor(net.sign * call.gain / gain)
    if old.config.time_embedding_type == "fourier":  # such a network divides its output by the time
        factor = factor / call.time
    tensors["conv_in.weight"] = tensors["conv_in.weight"] * (call.scale * call.sigma / shown)
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = tensors[name][: net.channels] * factor
    name = "time_embedding.linear_1.weight"
    tensors[name] = _for_one_time(
        tensors[name], old.time_proj(call.time), unet.time_proj(scheduler.timesteps)
    )
    unet.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("time_proj.")})
    return package.ConsistencyModelPipeline(unet.eval(), scheduler)


def _dit_pipeline(package: Any, net: DiffusersNet, call: Call, decoder: VAEDecoder) -> Any:
    """The pipeline of class-conditional transformers on latents, with one step of DDIM."""
    scheduler, gain = _one_step_ddim(package, call.skip * call.sigma)
    transformer = copy.deepcopy(net.model)
    transformer.register_to_config(out_channels=transformer.out_channels)  # the pipeline reads it there
    times = scheduler.timesteps.float()
    with torch.no_grad():
        transformer.pos_embed.proj.weight *= call.scale * call.sigma
        for parameter in transformer.proj_out_2.parameters():
            parameter *= net.sign * call.gain / gain
        for block in transformer.transformer_blocks:
            embedding = block.norm1.emb
            layer = embedding.timestep_embedder.linear_1
            layer.weight.copy_(
                _for_one_time(layer.weight, embedding.time_proj(call.time), embedding.time_proj(times))
            )
    return package.DiTPipeline(transformer, decoder.vae, scheduler)


def _one_step_ddim(package: Any, share: float) -> tuple[Any, float]:
    """A scheduler whose one step makes ``share z + gain F`` of unit noise z and what the network returns, F.

    With noise predicted it is ``z / sqrt(a) - sqrt(1 / a - 1) F``, with v ``sqrt(a) z - sqrt(1 - a) F``, with
    samples F, where a is the product of 1 - beta over all its times.

    Returns:
        The scheduler, set to one step, and the gain.
    """
    kind = "sample" if share == 0 else "v_prediction" if share < 1 else "epsilon"
    product = 0.5 if share == 0 else min(share**2, share**-2)
    # Halves are exact in float32, and so is a last factor between 1/2 and 1, to its rounding.
    halves = math.floor(-math.log2(product))
    betas = [0.5] * halves + [1 - product * 2.0**halves]
    scheduler = package.DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=kind,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(1)
    kept = float(scheduler.alphas_cumprod[-1])
    gain = {"sample": 1.0, "v_prediction": -math.sqrt(1 - kept), "epsilon": -math.sqrt(1 / kept - 1)}[kind]
    if abs(gain) < 1e-3:
        raise UserError(
            "no DDIM step keeps the noise of a sample unchanged",
            got="a student that predicts noise, at sigma 1",
            fix=_INSTEAD,
        )
    return scheduler, gain


def _for_one_time(weight: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Weights (E, D) of a layer that maps ``theirs`` (1, D) to what it mapped ``ours`` (1, D') to before.

    A one-step student uses one time, so the layer may represent it for any time of the scheduler.
    """
    ours, theirs = ours.double(), theirs.double()
    return (weight.double() @ ours.T @ theirs / theirs.square().sum()).to(weight.dtype)


@torch.no_grad()
def _difference(pipeline: Any, portable: Portable, folder: Path) -> float:
    """The largest difference between what was written and the student, before images are clipped.

    Raises:
        UserError: It is more than rounding.
    """
    name, plan = "unet" if "unet" in pipeline.components else "transformer", "scheduler"
    # What diffusers says about itself while it loads a whole pipeline is not for the user of an export.
    net, scheduler = (
        type(pipeline.components[part]).from_pretrained(folder / part, local_files_only=True, **options)
        for part, options in ((name, {"use_safetensors": True, "low_cpu_mem_usage": False}), (plan, {}))
    )
    inputs = portable.inputs(8)
    expected = portable.expected(inputs)
    found = one_step(net, scheduler, *inputs)
    call, far = portable.calls[0], float((found - expected).abs().max())
    # Where much noise is taken from much noise, float32 leaves its rounding of that in either of the two.
    rounding = 4 * torch.finfo(torch.float32).eps * call.skip * call.sigma * float(inputs[0].abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max())) + rounding
    if not far <= allowed:
        raise UserError(
            "the pipeline does not reproduce the student's samples, so it was not saved",
            got=f"a difference of {far:.2g}",
            expected=f"at most {allowed:.2g}",
            fix=_INSTEAD,
        )
    return far


def one_step(net: Callable[..., Any], scheduler: Any, noise: Tensor, labels: Tensor | None = None) -> Tensor:
    """What the loop of a stock pipeline makes of unit noise (B, C, H, W) in its one step, (B, C, H, W)."""
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    first = noise * scheduler.init_noise_sigma
    named = {} if labels is None else {"class_labels": labels}
    time = t.expand(len(noise))
    value = net(scheduler.scale_model_input(first, t), time, return_dict=False, **named)[0]
    return scheduler.step(value[:, : noise.shape[1]], t, first, return_dict=False)[0]


def _usage(kind: str, num_classes: int) -> str:
    start = [
        "import diffusers",
        "import torch",
        "",
        'pipeline = diffusers.DiffusionPipeline.from_pretrained("this/folder")',
        "generator = torch.Generator().manual_seed(0)",
    ]
    if kind != UNET:
        options = "guidance_scale=1.0, num_inference_steps=1, generator=generator"
        note = "# One step, and no guidance: what there was of it is in the student."
        return "\n".join([*start, note, f"images = pipeline([0, 0, 0], {options}).images"])
    labels = "class_labels=[0, 0, 0], " if num_classes else ""
    return "\n".join([*start, f"images = pipeline(batch_size=3, {labels}generator=generator).images"])
