"""What the samples of a denoiser are: themselves, or latents that an autoencoder makes images of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser


@runtime_checkable
class Decoder(Protocol):
    """The attribute ``denoiser.decoder`` of a latent denoiser. Equal ones (``==``) have the same latents.

    Attributes:
        shape: Shape of one decoded sample.
    """

    shape: tuple[int, ...]

    def decode(self, z: Tensor) -> Tensor:
        """Model-space samples (B, *latent shape) to images (B, *shape), in [-1, 1] up to errors."""
        ...

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, *shape) to model-space samples; ``noise`` draws from the encoder's distribution."""
        ...


class OfSamples(Protocol):
    """A denoiser, or anything else that holds samples of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...


def decoder_of(model: OfSamples) -> Decoder | None:
    """The decoder of a latent denoiser, found through wrappers; None for one that makes samples itself."""
    inner: Any = model
    while inner is not None:
        found = getattr(inner, "decoder", None)
        if found is not None:
            return found
        inner = getattr(inner, "inner", None)
    return None


def decode_samples(
    denoiser: Denoiser, z: Tensor, batch: int = 16, *, device: torch.device | str | None = None
) -> Tensor:
    """The last step of sampling: samples of ``denoiser`` as images, or unchanged where there is no decoder.

    Args:
        denoiser: What they were drawn from.
        z: Samples in model space, (B, *denoiser.shape).
        batch: Samples per batch.
        device: Where to compute, by default where they are; the images come back to where they are.
    """
    decoder = decoder_of(denoiser)
    if decoder is None:
        return z
    if not len(z):
        return z.new_empty(0, *decoder.shape)
    return torch.cat([decoder.decode(part.to(device or z.device)).to(z.device) for part in z.split(batch)])


def require_same_samples(models: Sequence[OfSamples], purpose: str) -> None:
    """Refuses models of different samples for a ``purpose`` that puts their predictions together.

    Equal shapes do not make latents of different autoencoders comparable, nor latents and images.

    Args:
        models: One or more.
        purpose: What they are for, for the message.

    Raises:
        UserError: Shapes or autoencoders differ.
    """
    shapes = [tuple(model.shape) for model in models]
    if len(set(shapes)) > 1:
        raise UserError(
            f"{purpose} needs models of the same samples",
            got=f"shapes {', '.join(map(str, shapes))}",
            expected="one shape",
            fix="use models of the same data at one resolution, or in one latent space",
        )
    decoders = [decoder_of(model) for model in models]
    first = decoders[0]
    if any((decoder is None) != (first is None) for decoder in decoders):
        raise UserError(
            f"{purpose} needs models of the same samples",
            got=f"shape {shapes[0]} for all, but with an autoencoder for some and without for others",
            expected="all of them to work on latents, or none",
            fix="if all do, give the others the decoder: model.decoder = latent_model.decoder",
        )
    if any(decoder is not first and decoder != first for decoder in decoders):
        raise UserError(
            f"{purpose} needs models of the same samples",
            got="latents of different autoencoders",
            expected="one autoencoder, with one scale and shift of its latents",
            fix="use models that were trained on the latents of one autoencoder",
        )
