"""Prompts of a distillation, and the samples that they describe: which, and whether they go together."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.inputs import read_limited
from distmatch.data import Dataset
from distmatch.data.images import read_image
from distmatch.data.prompts import captioned_images, has_captions, prompts_path, read_prompts
from distmatch.data.scaling import Scaling
from distmatch.diffusion.conditioning import LABEL, spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.prompts import prompt_encoder_of
from distmatch.interop import decoder_of
from distmatch.interop.encodings import key_of
from distmatch.training.options import DistillOptions


@dataclass(frozen=True)
class Images:
    """Images or video that are encoded, read when they are needed.

    Attributes:
        content: The key of image i, by its content.
        pixels: Images of these numbers, (B, *shape) in [-1, 1].
    """

    content: Callable[[int], str]
    pixels: Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Prompts:
    """What a distillation is conditioned on.

    Attributes:
        texts: The prompts, one for each sample where there are samples.
        images: Images to encode; None for prompts alone, or samples that need no encoding.
        data: Samples in the teacher's space, or the images.
        described: What the student keeps of a folder of images.
    """

    texts: Sequence[str]
    images: Images | None = None
    data: Dataset | None = None
    described: dict[str, Any] = field(default_factory=dict)


def given_prompts(
    options: DistillOptions,
    teacher: Denoiser,
    data: Dataset | None,
    texts: Sequence[str] | None,
    *,
    needs_data: bool,
) -> Prompts | None:
    """The prompts that the options or the data name; None where there are none.

    Args:
        options: The options.
        teacher: The teacher.
        data: Samples, if they are known already.
        texts: Prompts in place of those that the options name.
        needs_data: Whether the method compares with real samples.

    Raises:
        UserError: Prompts for a teacher that takes none, or that do not belong to the data.
    """
    encoder, own = prompt_encoder_of(teacher), options.encoding
    source = options.prompts
    if not source and texts is None and data is None and is_captioned(options.data, teacher):
        source = options.data
    # Light encoders encode captions in memory.
    heavy = hasattr(encoder, "free_text_encoders")
    captioned = data is not None and data.captions and heavy and not _is_conditioned(data, teacher)
    if texts is None and not source and not captioned:
        if encoder is None and own.prompt_dropout:
            raise UserError(
                "--prompt-dropout is for teachers that take prompts",
                got=f"a teacher that takes {', '.join(spec_of(teacher)) or 'no condition'}",
                fix="omit it",
            )
        if (own.encode, own.cache) != ("cache", ""):
            raise UserError(
                "--encode and --cache do nothing without prompts", fix="omit them, or pass --prompts"
            )
        return None
    if encoder is None:
        raise UserError(
            "this teacher takes no prompts",
            got=source or "prompts",
            expected="a pipeline with prompts, or a model that was trained on captions",
            fix="omit --prompts",
        )
    if options.run.flip:
        raise UserError("--flip mirrors images, and captions may say left and right", fix="omit it")
    path, column = prompts_path(source) if source else (Path(), "")
    if source and path.is_dir() and (needs_data or source == options.data):
        if data is not None:
            raise UserError(
                "two sources of data are given",
                got=f"--prompts {source}, a folder of images, and other data",
                fix="omit one of them",
            )
        return of_folder(path, column, source, teacher)
    if texts is None:
        texts = read_prompts(source) if source else data.captions if data is not None else ()
    if data is not None:
        return _of_data(data, texts, teacher, source or "the captions")
    if needs_data:
        raise prompts_alone(options.method, f"--prompts {source}" if source else f"{len(texts)} prompts")
    return Prompts(texts)


def prompts_alone(method: str, got: str) -> UserError:
    """The error for a method that compares with real samples, and prompts without."""
    return UserError(
        f"{method} needs real images, and these are prompts alone",
        got=got,
        expected="a folder of images with metadata.jsonl, or --data with a sample for each prompt",
        fix="use --method diff-instruct, dmd, sid, sim or moment-matching, which need none",
    )


def is_captioned(spec: str, teacher: Denoiser) -> bool:
    """Whether data are a folder of images with captions, for a teacher of latents and prompts."""
    if not spec or decoder_of(teacher) is None or prompt_encoder_of(teacher) is None:
        return False
    with contextlib.suppress(UserError):
        path, column = prompts_path(spec)
        return path.is_dir() and (bool(column) or has_captions(path))
    return False


def _is_conditioned(data: Dataset, teacher: Denoiser) -> bool:
    """Whether data hold the teacher's conditioning, as far as is known made by its own encoder."""
    encoder = prompt_encoder_of(teacher)
    made = data.prompt_encoder
    ours = made is None or encoder is None or made.fingerprint == encoder.fingerprint
    return ours and set(spec_of(teacher)) - {LABEL} <= set(data.conditions)


def of_folder(folder: Path, column: str, source: str, teacher: Denoiser) -> Prompts:
    """Images of a folder with their captions, cropped and resized to the size of the teacher's images.

    Raises:
        UserError: The teacher's samples are no color images, or the folder cannot be used.
    """
    decoder = decoder_of(teacher)
    shape = tuple(teacher.shape if decoder is None else decoder.shape)
    if len(shape) != 3 or shape[0] != 3:
        raise UserError(
            "a folder of images is no data for this teacher",
            got=source,
            expected=f"samples of shape {shape}",
            fix="pass them as an .npz with --data, and --prompts with a caption for each",
        )
    files, texts = zip(*captioned_images(folder, column), strict=True)
    height, width = shape[1:]

    def pixels(rows: Sequence[int]) -> Tensor:
        images = np.stack([read_image(files[i], (height, width), color=True) for i in rows])
        return torch.from_numpy(images).float() / 127.5 - 1

    @functools.cache  # each file is read once for it
    def content(i: int) -> str:
        return key_of(read_limited(files[i], 2**30, "an image"), f"{height}x{width}")

    scaling = Scaling.for_images(0, 255, "uint8 images, 0..255").to_dict()
    about = {"spec": "", "name": str(folder), "scaling": scaling, "samples": len(texts)}
    return Prompts(texts, Images(content, pixels), described=about)


def _of_data(data: Dataset, texts: Sequence[str], teacher: Denoiser, source: str) -> Prompts:
    """Samples with a prompt for each."""
    if len(texts) != len(data):
        raise UserError(
            "there must be one prompt for each sample of the data, in their order",
            got=f"{len(texts)} prompts in {source} and {len(data)} samples in {data.name}",
            fix="omit --data for prompts alone, with a method that needs no data",
        )
    decoder = decoder_of(teacher)
    if decoder is None or tuple(data.shape) == tuple(teacher.shape):
        return Prompts(texts, data=data)

    def pixels(rows: Sequence[int]) -> Tensor:
        return data.batch(torch.tensor(rows))[0]

    def content(i: int) -> str:
        return key_of_pixels(pixels([i])[0])

    return Prompts(texts, Images(content, pixels), data)


def key_of_pixels(x: Tensor) -> str:
    """The key of an image or video in [-1, 1], by its content."""
    return key_of(x.numpy().tobytes(), str(tuple(x.shape)))


def described_prompts(prompts: Prompts, source: str) -> dict[str, Any]:
    """What a student keeps of its prompts."""
    return {"source": source, "number": len(prompts.texts), "sha256": digest_of(prompts.texts)}


def digest_of(texts: Sequence[str]) -> str:
    """A sha256 (hex) of prompts, or of the keys of images, in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
