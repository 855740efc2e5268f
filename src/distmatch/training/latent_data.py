"""Images as the latents of a teacher that works on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.progress import progress
from distmatch.base.seeds import generator
from distmatch.data import Dataset, Scaling
from distmatch.diffusion.denoiser import Denoiser
from distmatch.interop import Decoder, decoder_of

_BATCH = 32


@torch.no_grad()
def as_latents(data: Dataset, teacher: Denoiser, seed: int, device: torch.device) -> Dataset:
    """The data in the space in which the teacher works: encoded once, or as they are.

    Latents are drawn from the encoder's Gaussian, as they were when such teachers were trained.

    Args:
        data: Images, or anything for a teacher without autoencoder.
        teacher: The teacher.
        seed: Seed of these draws.
        device: Where to encode.

    Raises:
        UserError: The images are not of the size that the autoencoder works on.
    """
    decoder = decoder_of(teacher)
    check_encodable(data, teacher)
    if decoder is None or tuple(data.shape) == tuple(teacher.shape):
        return data
    gen = generator(seed, "encode")
    latents = torch.empty(len(data), *teacher.shape)
    with progress(len(data), desc="encode", delay=5.0) as bar:
        for rows in torch.arange(len(data)).split(_BATCH):
            x, _ = data.batch(rows)
            noise = torch.randn(len(rows), *teacher.shape, generator=gen)
            latents[rows] = decoder.encode(x.to(device), noise.to(device)).cpu()
            bar.update(len(rows))
    scaling = Scaling.for_images(-1.0, 1.0, "latents, as they are")
    name = f"latents of {data.name}"
    return Dataset(latents, data.labels, data.class_names, name, scaling, conditions=data.conditions)


@torch.no_grad()
def drawn_latents(decoder: Decoder, x: Tensor, keys: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Latents from the encoder's Gaussian, always the same of an image.

    Args:
        decoder: The autoencoder.
        x: Images (B, ...) in [-1, 1], where it is to run.
        keys: The key of each image, by its content.
        shape: Shape of a latent.

    Returns:
        (B, *shape) on the CPU.
    """
    gens = [generator(0, f"encode/{key}") for key in keys]
    noise = torch.stack([torch.randn(tuple(shape), generator=gen) for gen in gens])
    return decoder.encode(x, noise.to(x.device)).cpu()


def check_encodable(data: Dataset, teacher: Denoiser) -> None:
    """Refuses data that are neither images of the size of a teacher's autoencoder nor its latents.

    Raises:
        UserError: They are not. Data for a teacher without autoencoder are not looked at.
    """
    decoder = decoder_of(teacher)
    made = data.recorded.decoder if data.recorded is not None else ""
    if made and decoder is not None and made != getattr(decoder, "fingerprint", made):
        raise UserError(
            f"{data.name} holds latents of another autoencoder than the teacher's",
            got=f"fingerprint {made[:12]}",
            expected=f"{getattr(decoder, 'fingerprint', '')[:12]}",
            fix="prepare the images again with --teacher and this teacher",
        )
    if decoder is None or tuple(data.shape) in (tuple(teacher.shape), tuple(decoder.shape)):
        return
    raise UserError(
        "the teacher's autoencoder and the data do not have the same shape",
        got=f"autoencoder {tuple(decoder.shape)}, data {tuple(data.shape)}",
        expected=f"images {tuple(decoder.shape)}, or latents {tuple(teacher.shape)}",
        fix="resize the images to the teacher's size",
    )
