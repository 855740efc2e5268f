"""Batches of prompts, and of images with captions: encoded once, in a cache on disk, or in each step."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.files import cache_folder
from distmatch.base.seeds import generator
from distmatch.base.stack import caller_level
from distmatch.data.batches import ALL, Batch, BatchOf, Pool
from distmatch.data.order import BatchOrder
from distmatch.diffusion.conditioning import LABEL, Conditioning, null_conditioning, spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.prompts import PromptEncoder, prompt_encoder_of
from distmatch.interop import decoder_of
from distmatch.interop.encodings import encoded, key_of
from distmatch.interop.pipelines.truncated import Truncated, truncation_warnings
from distmatch.training.latent_data import drawn_latents
from distmatch.training.options import DistillOptions, RunOptions
from distmatch.training.prompted import Prompts

ENCODINGS = "encodings"
"""Name of the folder of encodings, in the cache or in a store."""
_LATENT = "z"
_IMAGES_AT_A_TIME = 8

Rows = Callable[[Tensor], Conditioning]
"""The encodings of prompts by their numbers (B,)."""


def prompt_batches(
    prompts: Prompts,
    teacher: Denoiser,
    options: DistillOptions,
    device: torch.device,
    *,
    dry: bool = False,
    remarks: list[str] | None = None,
) -> BatchOf:
    """Batches of prompts, with clean samples where there are some; what is cached is encoded here.

    Args:
        prompts: From :func:`given_prompts`.
        teacher: The teacher.
        options: The options.
        device: Where the batches go.
        dry: Whether nothing may be written: batches are then encoded as they are drawn.
        remarks: Receives a sentence for each limit at which prompts are cut off; None warns of them.

    Raises:
        UserError: Prompts that are encoded to different lengths, or a cache that cannot be written.
    """
    encoder, run = prompt_encoder_of(teacher), options.run
    if encoder is None:
        raise RuntimeError("a teacher without prompts")
    live = dry or options.encoding.encode == "live"
    folder = Path(options.encoding.cache).expanduser() if options.encoding.cache else None
    own = Path(options.data).expanduser() / ENCODINGS  # of a store
    folder = folder or (own if options.data and own.is_dir() else cache_folder() / ENCODINGS)
    on = getattr(encoder, "on", None)
    with contextlib.nullcontext() if on is None or live else on(device):
        texts = prompts.texts
        conditioning = (
            _live(encoder, texts, remarks) if live else cached(encoder, texts, teacher, folder, remarks)
        )
        samples = _samples(prompts, teacher, None if live else folder, device)
    if not live:
        _free(encoder)
    paired = prompts.data is not None or prompts.images is not None
    order = BatchOrder(len(texts), run.batch, run.seed) if paired else None

    def given(rows: Tensor) -> Conditioning:
        found = conditioning(rows)
        if prompts.data is None or prompts.data.labels is None or LABEL not in spec_of(teacher):
            return found
        return Conditioning({LABEL: prompts.data.labels[rows], **found})

    pool = Pool(len(texts), given, texts)

    def batch(step: int, part: slice = ALL) -> Batch:
        if order is not None:
            rows = order.indices(step)[part]
        else:
            gen = generator(run.seed, f"prompts/{step}")
            rows = torch.randint(len(texts), (run.batch,), generator=gen)[part]
        own = [texts[i] for i in rows.tolist()]
        return Batch(samples(rows), given(rows), texts=own, pool=pool).on(device)

    return batch


def size_of_encodings(options: DistillOptions, teacher: Denoiser, texts: Sequence[str]) -> int:
    """The bytes that the encodings of prompts take in the cache.

    Raises:
        UserError: Prompts that are encoded to different lengths.
    """
    if options.encoding.encode == "live":
        return 0
    _require_one_length(teacher)
    row = sum(math.prod(field.shape) * field.dtype.itemsize for field in spec_of(teacher).values())
    return row * len(set(texts))


def with_dropout(batches: BatchOf, teacher: Denoiser, share: float, run: RunOptions) -> BatchOf:
    """Batches in which a share of the samples has the null conditioning, drawn for each step and place."""
    if not share:
        return batches

    def batch(step: int, part: slice = ALL) -> Batch:
        found = batches(step, part)
        n, device = len(found.x), found.x.device
        drawn = torch.rand(run.batch, generator=generator(run.seed, f"prompt dropout/{step}"))
        kept = drawn[part] >= share
        null = null_conditioning(teacher, n, device)
        texts = [text if keep else "" for text, keep in zip(found.texts, kept.tolist(), strict=False)]
        return Batch(found.x, found.conditioning.where(kept.to(device), null), found.noise, texts, found.pool)

    return batch


def _encoded(encoder: PromptEncoder, texts: Sequence[str]) -> tuple[Conditioning, Truncated]:
    """Encodings, and which texts the tokenizers of a pipeline cut off."""
    cut: Truncated = {}
    counts: dict[str, Any] = {"truncated": cut} if hasattr(encoder, "free_text_encoders") else {}
    return encoder.encode(texts, **counts), cut


def remark_truncated(encoder: Any, texts: Sequence[str], remarks: list[str] | None = None) -> None:
    """Says how many prompts a pipeline cuts off, which are not encoded for it; nothing for other encoders.

    Args:
        encoder: The teacher's encoder.
        texts: The prompts.
        remarks: Receives the sentences; None warns.
    """
    if hasattr(encoder, "truncated"):
        _remark(encoder.truncated(texts), len(texts), remarks)


def _remark(cut: Truncated, total: int, remarks: list[str] | None) -> None:
    found = truncation_warnings(cut, total)
    if remarks is not None:
        remarks += found
        return
    for message in found:
        warnings.warn(message, stacklevel=caller_level())


def _live(encoder: PromptEncoder, texts: Sequence[str], remarks: list[str] | None) -> Rows:
    """The prompts of numbers, encoded each time."""
    remark_truncated(encoder, texts, remarks)
    return lambda rows: _encoded(encoder, [texts[i] for i in rows.tolist()])[0]


def _require_one_length(teacher: Denoiser) -> None:
    """Refuses to keep encodings that depend on the other prompts of their batch."""
    if open_ended := [name for name, field in spec_of(teacher).items() if -1 in field.shape]:
        raise UserError(
            "this pipeline encodes prompts to the length of the longest of a batch: encodings cannot be kept",
            got=f"any number of tokens in {', '.join(open_ended)}",
            fix="pass a fixed number of tokens, such as --tokens 128, or --encode live",
        )


def cached(
    encoder: PromptEncoder,
    texts: Sequence[str],
    teacher: Denoiser,
    folder: Path,
    remarks: list[str] | None = None,
) -> Rows:
    """The prompts of numbers, encoded once.

    Args:
        encoder: The teacher's encoder.
        texts: The prompts.
        teacher: The teacher.
        folder: Where encodings are kept.
        remarks: As for :func:`prompt_batches`.

    Raises:
        UserError: Prompts that are encoded to different lengths, or a folder that cannot be written.
    """
    _require_one_length(teacher)
    cut: Truncated = {}

    def compute(rows: list[int]) -> Mapping[str, Tensor]:
        found, here = _encoded(encoder, [texts[i] for i in rows])
        for limit, places in here.items():
            cut.setdefault(limit, set()).update(rows[place] for place in places)
        return found

    keys = [key_of(text) for text in texts]
    rows = encoded(folder, encoder.fingerprint, keys, compute, what="prompts", remarks=cut)
    _remark(cut, len(texts), remarks)
    return rows.index


def _samples(
    prompts: Prompts, teacher: Denoiser, folder: Path | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Clean samples of numbers, in the teacher's space; zeros where there are none."""
    data, images, decoder = prompts.data, prompts.images, decoder_of(teacher)
    if images is None or decoder is None:
        if images is not None:
            return lambda rows: images.pixels(rows.tolist())
        if data is not None:
            return lambda rows: data.batch(rows)[0]
        return lambda rows: torch.zeros(len(rows), *teacher.shape)

    def encode(rows: Sequence[int]) -> dict[str, Tensor]:
        keys = [images.content(i) for i in rows]
        x = images.pixels(rows).to(device)
        return {_LATENT: drawn_latents(decoder, x, keys, teacher.shape)}

    made = getattr(decoder, "fingerprint", None)
    if folder is None or made is None:
        return lambda rows: encode(rows.tolist())[_LATENT]
    keys = [images.content(i) for i in range(len(prompts.texts))]
    found = encoded(folder, made, keys, encode, what="images", batch=_IMAGES_AT_A_TIME)
    return lambda rows: found.index(rows)[_LATENT]


def _free(encoder: PromptEncoder) -> None:
    """Frees the text encoders of a pipeline, as all prompts are encoded."""
    free = getattr(encoder, "free_text_encoders", None)
    try:
        if free is not None:
            free()
    except UserError as error:
        warnings.warn(f"the text encoders stay in memory: {error}", stacklevel=caller_level())
