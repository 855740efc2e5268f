"""What models of prompts are measured against: images with captions, or other samples of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.base.progress import tell
from distmatch.base.seeds import generator, stream_seed
from distmatch.data import Dataset, Scaling, load_data
from distmatch.data.columns import columns_of
from distmatch.data.prompts import prompts_path, read_prompts
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.prompts import encode_prompts, prompt_encoder_of
from distmatch.training.devices import pick_device
from distmatch.training.models import Model
from distmatch.training.prompted import digest_of, is_captioned, of_folder
from distmatch.training.sampling import Sampling

BLOCK = 100
"""Samples in a block, if not stated: two blocks are drawn from each model, the teacher's with many calls."""
_SEEDS = 8  # samples of a prompt


@dataclass(frozen=True)
class PromptReference:
    """A reference with a caption for each sample.

    Attributes:
        data: Its samples, conditioned on what the teacher makes of the captions.
        of: What they are where they are no real data, else ''.
    """

    data: Dataset
    of: str = ""


def prompts_of_run(info: Mapping[str, Any], named: str, run: str) -> list[str]:
    """The prompts to measure a student on: those of a file, else those that it was distilled on.

    Args:
        info: What the student says of its training.
        named: The file; '' takes that of the run.
        run: What the run is called, for messages.

    Raises:
        UserError: They were kept in no file, or the file has changed since.
    """
    own = info.get("prompts") or {}
    if named or not own:
        return read_prompts(named) if named else []
    if not own.get("source"):
        raise UserError(
            f"{run} was distilled on prompts that were passed in Python, and only their hash was kept",
            expected="a file of prompts to measure it on",
            fix="pass --prompts FILE",
        )
    try:
        texts = read_prompts(own["source"])
    except UserError as error:
        raise UserError(
            f"the prompts that {run} was distilled on are not there any more",
            got=str(error),
            fix="pass --prompts FILE",
        ) from error
    if digest_of(texts) != own.get("sha256"):
        raise UserError(
            f"the prompts in {own['source']} are not those that {run} was distilled on",
            got=f"{len(texts)} prompts with another sha256",
            expected=f"the {own.get('number')} of the run",
            fix=f"restore the file, or measure on it as it is: --prompts {own['source']}",
        )
    return texts


def images_in(prompts: str, data: str, denoiser: Denoiser) -> str:
    """The folder of images with captions among what is named; '' where there is none.

    Args:
        prompts: A file of prompts or such a folder, or ''.
        data: Data, or ''.
        denoiser: The model that is conditioned on the captions.

    Raises:
        UserError: There are no such prompts.
    """
    if prompts and prompts_path(prompts)[0].is_dir():
        return prompts
    return data if is_captioned(data, denoiser) else ""


def reference_on_prompts(
    teacher: Model | None,
    texts: Sequence[str],
    *,
    folder: str = "",
    spec: str = "",
    data: Dataset | None = None,
    n: int | None = None,
    sampling: Sampling,
    seed: int,
    device: str,
    batch: int,
) -> PromptReference:
    """What to measure on prompts: their images where there are such, else samples of the teacher.

    Args:
        teacher: The teacher.
        texts: The prompts; not used for images with captions.
        folder: A folder of images with captions; '' for none.
        spec: Data with a sample for each prompt; '' for none.
        data: Used instead of the data that it names.
        n: Samples in a block; None takes :data:`BLOCK`.
        sampling: How the teacher is sampled.
        seed: Of the choice, and of the teacher's samples.
        device: Where to encode and to sample.
        batch: Samples at a time.

    Raises:
        UserError: Prompts and samples do not belong together, or samples of a teacher are needed and there is
            none.
    """
    if teacher is None or teacher.teacher is None:
        raise UserError(
            "without the teacher nothing is known of samples on prompts",
            got="no teacher",
            expected="the teacher, whose samples are the reference where there are no real images, and whose "
            "encoders make what models receive of the prompts",
            fix="name it with --teacher",
        )
    if folder:
        data = _images(folder, teacher.teacher, 2 * (n or BLOCK), seed)
    elif spec or data is not None:
        data = load_data(spec, columns=columns_of(teacher.trained_on)) if data is None else data
        if len(data) != len(texts):
            raise UserError(
                "there must be one prompt for each sample of the data, in their order",
                got=f"{len(texts)} prompts and {len(data)} samples in {data.name}",
            )
        order = torch.randperm(len(data), generator=generator(seed, "captioned reference"))
        data = replace(data, captions=tuple(texts)).subset(order[: 2 * (n or BLOCK)])
    else:
        return _taught(teacher, texts, 2 * (n or BLOCK), sampling, seed, device, batch)
    place = {text: i for i, text in enumerate(dict.fromkeys(data.captions))}
    rows = torch.tensor([place[text] for text in data.captions])
    told = encoded_for(teacher.teacher, list(place), device).index(rows)
    return PromptReference(replace(data, conditions=told))


def _images(source: str, teacher: Denoiser, most: int, seed: int) -> Dataset:
    """At most so many images of a folder with their captions, at the size of the teacher's."""
    path, column = prompts_path(source)
    found = of_folder(path, column, source, teacher)
    if found.images is None:
        raise RuntimeError("a folder of images without images")
    rows = torch.randperm(len(found.texts), generator=generator(seed, "captioned reference"))[:most].tolist()
    parts = [found.images.pixels([i]) for i in rows]
    raw = ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8)
    scaling = Scaling.from_dict(found.described["scaling"])
    return Dataset(raw, None, (), source, scaling, captions=tuple(found.texts[i] for i in rows))


def _taught(
    teacher: Model, texts: Sequence[str], count: int, sampling: Sampling, seed: int, device: str, batch: int
) -> PromptReference:
    """Samples of the teacher on prompts that are spread evenly over the given ones, each several times."""
    texts = list(dict.fromkeys(texts))
    number = min(len(texts), max(1, count // _SEEDS))
    prompts = [texts[i * len(texts) // number] for i in range(number)]
    turn = torch.arange(count) % number
    told = encoded_for(teacher.teacher, prompts, device).index(turn)
    guided = f" at guidance {sampling.guidance:g}" if sampling.guidance != 1 else ""
    of = f"{count} samples of the teacher{guided}, from other noise, on {number} prompts"
    tell(f"the reference: {of}")
    drawn = teacher.draw(
        count, told, stream_seed(seed, "teacher as reference"), sampling, batch=batch, device=device
    )
    raw = teacher.scaling.to_raw(drawn.x)
    captions = tuple(prompts[i] for i in turn.tolist())
    data = Dataset(raw, None, (), of, teacher.scaling, conditions=told, captions=captions)
    return PromptReference(data, of)


def encoded_for(denoiser: Any, texts: Sequence[str], device: str, *, free: bool = True) -> Conditioning:
    """Prompts as a model takes them; the text encoders of a pipeline are then freed.

    Args:
        denoiser: The model.
        texts: The prompts.
        device: Where to encode.
        free: Whether text encoders are freed.

    Raises:
        UserError: The model takes no prompts.
    """
    encoder: Any = prompt_encoder_of(denoiser)
    with encoder.on(pick_device(device)) if hasattr(encoder, "on") else nullcontext():
        found = encode_prompts(denoiser, texts).to("cpu")
    if free and hasattr(encoder, "free_text_encoders"):
        encoder.free_text_encoders()
    return found


def guided_as(sampling: Sampling, about: Mapping[str, Any], teacher: Denoiser, device: str) -> Sampling:
    """The sampling of a teacher with the guidance that a student was distilled with.

    Args:
        sampling: Solver and grid.
        about: ``guidance``, ``guidance_interval``, ``guidance_rescale``, ``negative_prompt``, where known.
        teacher: The teacher.
        device: Where a negative prompt is encoded.
    """
    scale = about.get("guidance") or 1.0
    if scale == 1:
        return sampling
    interval, negative = about.get("guidance_interval"), about.get("negative_prompt")
    low_high = [float(level) * teacher.sigma_data for level in interval or ()]
    return replace(
        sampling,
        guidance=scale,
        interval=(low_high[0], low_high[1]) if low_high else None,
        rescale=about.get("guidance_rescale") or 0.0,
        negative=encoded_for(teacher, [negative], device, free=False) if negative else None,
    )
