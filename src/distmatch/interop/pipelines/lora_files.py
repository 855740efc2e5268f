"""Adapters in the layouts of diffusers and of ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distmatch.interop.lora import NAME, adapters_of

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui.safetensors"

# Names of the layers of Wan's own code, which ComfyUI uses, by those of diffusers.
_WAN = {
    r"\battn1\.": "self_attn.",
    r"\battn2\.": "cross_attn.",
    r"\bto_([qkv])$": r"\1",
    r"\bto_out\.0$": "o",
    r"\badd_([kv])_proj$": r"\1_img",
    r"\bffn\.net\.0\.proj$": "ffn.0",
    r"\bffn\.net\.2$": "ffn.2",
    r"^condition_embedder\.time_proj$": "time_projection.1",
    r"^condition_embedder\.(time|text)_embedder\.linear_1$": r"\1_embedding.0",
    r"^condition_embedder\.(time|text)_embedder\.linear_2$": r"\1_embedding.2",
    r"^proj_out$": "head.head",
}


def diffusers_tensors(network: nn.Module, part: str) -> dict[str, Tensor]:
    """The adapters of a network as ``load_lora_weights`` of its pipeline reads them.

    The scale alpha / rank is in the second factor: without an alpha readers take alpha = rank.

    Args:
        network: A network with adapters.
        part: Its name in the pipeline, ``"unet"`` or ``"transformer"``.
    """
    found = {}
    for name, (down, up, scale) in _factors(network).items():
        found[f"{part}.{name}.lora_A.weight"] = down
        found[f"{part}.{name}.lora_B.weight"] = up * scale
    return found


def comfyui_tensors(network: nn.Module) -> dict[str, Tensor] | None:
    """The adapters as ComfyUI's LoRA loader reads them (``comfy/lora.py``); None for other networks.

    It looks up each layer by the names that it knows for a family: for U-Nets ``lora_unet_`` and the name in
    diffusers with underscores, for most transformers ``transformer.`` and the name in diffusers, for Wan
    ``diffusion_model.`` and the name in Wan's own code. The change of a weight is
    ``up @ down * alpha / rank``, or ``up @ down`` without an alpha.
    """
    rule = _COMFYUI.get(type(network).__name__)
    if rule is None:
        return None
    kohya = rule is _unet_name
    found = {}
    for name, (down, up, scale) in _factors(network).items():
        there = rule(name)
        if kohya:
            found[f"{there}.lora_down.weight"], found[f"{there}.lora_up.weight"] = down, up
            found[f"{there}.alpha"] = torch.tensor(scale * len(down))
        else:
            found[f"{there}.lora_A.weight"], found[f"{there}.lora_B.weight"] = down, up * scale
    return found


def _factors(network: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """First and second factor and scale of each adapter."""
    return {
        name: (
            layer.lora_A[NAME].weight.detach().float().cpu(),
            layer.lora_B[NAME].weight.detach().float().cpu(),
            float(layer.scaling[NAME]),
        )
        for name, layer in adapters_of(network).items()
    }


def _unet_name(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def _transformer_name(name: str) -> str:
    return "transformer." + name


def _wan_name(name: str) -> str:
    for pattern, there in _WAN.items():
        name = re.sub(pattern, there, name)
    return "diffusion_model." + name


_COMFYUI: dict[str, Callable[[str], str]] = {
    "UNet2DConditionModel": _unet_name,
    "WanTransformer3DModel": _wan_name,
    **dict.fromkeys(
        (
            "SD3Transformer2DModel",
            "FluxTransformer2DModel",
            "QwenImageTransformer2DModel",
            "ZImageTransformer2DModel",
            "AuraFlowTransformer2DModel",
        ),
        _transformer_name,
    ),
}
