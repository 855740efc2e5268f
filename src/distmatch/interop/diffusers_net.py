"""A network of diffusers called in our way: ``net(x, t, labels)``, with its inner activations on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import check_null
from distmatch.diffusion.denoiser import Output, ReturnFeatures
from distmatch.diffusion.hooked import Listener, features_of_pass, named_part
from distmatch.nets.layers import feature_blocks

UNET, DIT = "UNet2DModel", "DiTTransformer2DModel"
MODELS = (UNET, DIT)


class DiffusersNet(nn.Module):
    """``net(x, t, labels)`` around a ``UNet2DModel`` or ``DiTTransformer2DModel``; -1 and None are no label.

    Args:
        model: The network of diffusers.
        sign: Factor of the output; -1 turns the "v" of EDM schedulers into the usual network output.
        null_class: The label that means "unconditional". None: a transformer's own, and none for a U-Net.
        features: Names of the modules whose outputs are its features. None: the middle of a U-Net, or
            the blocks at 1/2 and 3/4 of the depth of a transformer.

    Raises:
        UserError: Another kind of network, or a module that it does not have.
    """

    has_features = True
    listener: Listener | None = None

    def __init__(
        self,
        model: Any,
        *,
        sign: float = 1.0,
        null_class: int | None = None,
        features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.kind = type(model).__name__
        if self.kind not in MODELS:
            raise UserError(
                "this network of diffusers is not supported as a teacher",
                got=self.kind,
                expected=" or ".join(MODELS),
                fix="fix its further inputs and wrap it: dm.as_denoiser(lambda x, t: "
                'net(x, t, text).sample, "vp", "eps", shape=...)',
            )
        self.model = model
        self.sign = float(sign)
        self.channels = int(model.config.in_channels)
        outputs = int(model.config.out_channels or self.channels)
        if outputs not in (self.channels, 2 * self.channels):
            raise UserError(
                "the network does not return a tensor of the shape of its input",
                got=f"{outputs} channels for {self.channels}",
                expected=f"{self.channels}, or {2 * self.channels} with a variance, which is not used",
            )
        count, own = _classes(model)
        self.takes_labels = count > 0
        self.null_class = own if null_class is None else null_class
        rows = count + (own is not None)
        if null_class is not None:
            check_count("null_class", null_class, 0, rows - 1)
        # A last class that means "none" cannot be requested for samples.
        self.num_classes = count - 1 if null_class is not None and null_class == count - 1 else count
        self.features = tuple(default_features(model) if features is None else features)
        for name in self.features:
            named_part(model, name)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, return_features: ReturnFeatures = False
    ) -> Output:
        """The prediction (B, C, H, W) for ``x`` (B, C, H, W) at times ``t`` (B,), with ``labels`` (B,).

        Features are the outputs of the named modules, tokens as maps (B, C, H, W); with ``"only"`` the pass
        stops when the last of them is computed.
        """
        if not return_features:
            return self._prediction(x, t, labels)

        def call() -> Tensor:
            return self._prediction(x, t, labels)

        return features_of_pass(self.model, self.features, call, x, return_features, self.listener)

    def listen(self) -> None:
        """Prepares it for a compiler."""
        self.listener = Listener(self.model, self.features)

    def _prediction(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        arguments = {"class_labels": self._labels(labels, x)} if self.takes_labels else {}
        out = self.model(x.to(self.model.dtype), t, return_dict=False, **arguments)[0][:, : self.channels]
        return out if self.sign == 1 else self.sign * out

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor:
        """Labels with the null class for unconditional samples."""
        if self.null_class is not None:
            check_null(labels, self.null_class, self.num_classes)
            if labels is None:
                return torch.full((len(x),), self.null_class, device=x.device)
            return torch.where(labels < 0, self.null_class, labels)
        # On an accelerator the check would wait for the device; there the embedding itself refuses -1.
        # No graph can branch on it.
        looked = labels is None or (labels.device.type == "cpu" and not torch.compiler.is_compiling())
        if labels is None or (looked and bool((labels < 0).any())):
            raise UserError(
                "this teacher has no null class",
                got="samples without a condition",
                fix="give every sample a label and leave guidance at 1, or set null_class",
            )
        return labels


def _classes(model: Any) -> tuple[int, int | None]:
    """The number of classes of a network, and its null class if it is known to have one."""
    config = model.config
    if type(model).__name__ == DIT:
        # One row more than classes is trained with labels left out (Peebles & Xie 2023).
        return int(config.num_embeds_ada_norm), int(config.num_embeds_ada_norm)
    if config.class_embed_type is not None:
        raise UserError(
            "conditioning other than classes is not supported",
            got=f"class_embed_type {config.class_embed_type!r}",
        )
    return int(config.num_class_embeds or 0), None


def default_features(model: Any) -> list[str]:
    """The modules of a network of diffusers whose output is lent as features."""
    if type(model).__name__ == DIT:
        return [f"transformer_blocks.{index}" for index in feature_blocks(len(model.transformer_blocks))]
    return ["mid_block"] if model.mid_block is not None else [f"down_blocks.{len(model.down_blocks) - 1}"]
