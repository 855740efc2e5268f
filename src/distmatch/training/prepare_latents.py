"""Stores of latents: images as the samples of a teacher with an autoencoder, and their captions encoded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.store.prepare import Latents, prepare
from distmatch.data.store.reading import load_store
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.prompts import prompt_encoder_of
from distmatch.interop import decoder_of
from distmatch.training.latent_data import drawn_latents
from distmatch.training.prompt_batches import ENCODINGS, cached
from distmatch.training.prompted import key_of_pixels

_AT_A_TIME = 8


def prepare_latents(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    teacher: Denoiser,
    device: torch.device,
    **options: Any,
) -> dict[str, Any]:
    """A store of latents: :func:`~distmatch.data.store.prepare.prepare` with a teacher's autoencoder.

    Each image is a draw from the encoder's Gaussian, which depends on its content alone: the same as when a
    distillation encodes it. Captions are encoded into the folder ``encodings`` of the store, which has the
    form of every cache of encodings.

    Args:
        source: Images.
        out: The store.
        teacher: The teacher.
        device: Where to encode.
        options: Of :func:`~distmatch.data.store.prepare.prepare`.

    Returns:
        The index of the store.

    Raises:
        UserError: The teacher has no autoencoder of images, or as of ``prepare``.
    """
    decoder = decoder_of(teacher)
    if decoder is None or len(decoder.shape) != 3:
        raise UserError(
            "--teacher encodes images as latents, and this teacher has no autoencoder of images",
            got=f"samples of shape {tuple(teacher.shape)}",
            fix="omit --teacher: its samples are stored as they are",
        )
    encoder: Any = prompt_encoder_of(teacher)
    on = getattr(encoder, "on", None)
    shape = tuple(teacher.shape)

    def encode(x: Tensor) -> Tensor:
        parts = []
        for part in x.split(_AT_A_TIME):
            keys = [key_of_pixels(image) for image in part]
            parts.append(drawn_latents(decoder, part.to(device), keys, shape))
        return torch.cat(parts)

    latents = Latents(tuple(decoder.shape), getattr(decoder, "fingerprint", ""), encode)
    with contextlib.nullcontext() if on is None else on(device):
        index = prepare(source, out, latents=latents, **options)
        folder = Path(out).expanduser()
        captions = load_store(folder).captions
        if captions and hasattr(encoder, "free_text_encoders"):
            cached(encoder, captions, teacher, folder / ENCODINGS)
    return index
