"""What `distmatch sample` draws under: prompts, the rows of a file, classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.data.classes import checked_conditioning, class_named, drawn_labels
from distmatch.data.prompts import read_prompts
from distmatch.diffusion.conditioning import (
    LABEL,
    Conditioning,
    as_conditioning,
    check_conditioning,
    label_spec,
)
from distmatch.diffusion.prompts import prompt_encoder_of
from distmatch.methods.context import GUIDANCE
from distmatch.training.models import Model
from distmatch.training.prompt_reference import encoded_for

Rows = Callable[[int, int], Conditioning]
Options = Any
"""``SampleOptions``, in whose module these functions are called."""

HOW = {
    "data": "in the shares of the training data (--class-balance uniform draws them evenly)",
    "uniform": "evenly",
    "unknown": "uniformly, as the model does not record how often each occurred in its training data",
    "given": "those of --classes, in turn",
}


def conditioning_of(
    o: Options, model: Model, n: int, given: Conditioning | None, texts: Sequence[str]
) -> tuple[Rows, str]:
    """What to draw under, and how its classes were chosen: a key of HOW, '' where the command chose none.

    The first is a function of (first, count), so that it need not be in memory for all samples.

    Args:
        o: The options.
        model: The model.
        n: Number of samples.
        given: The rows of ``--conditions``.
        texts: The prompts.

    Raises:
        UserError: Options that do not go together, or not with this model.
    """
    names, counts = model.classes.names, model.classes.counts
    if given is not None:
        refuse(o, ("classes", "class_balance"), "--conditions already determines the conditions")
        if given.batch_size != n:
            raise UserError(
                "--conditions must have one row for each sample",
                got=f"{given.batch_size} rows and --n {n}",
                fix="omit --n, or give a file with as many rows",
            )
        whole = checked_conditioning(given, n, model, o.seed)
        return lambda first, count: whole.index(slice(first, first + count)), ""
    if texts:
        encoded = checked_conditioning(
            encoded_for(denoiser_in(model), texts, o.device), len(texts), model, o.seed
        )
        return lambda first, count: encoded.index(_in_turn(first, count, len(texts))), ""
    if others := set(model.conditioning_spec) - {LABEL}:
        takes = prompt_encoder_of(denoiser_in(model)) is not None
        raise UserError(
            "this model needs the conditioning of its samples",
            got="no --prompt" if takes else "no --conditions",
            expected=f"values of {', '.join(model.conditioning_spec)}",
            fix='--prompt "a red cat", or --prompts FILE'
            if takes
            else f"--conditions FILE.npz with condition_{min(others)}, ..., one row for each sample",
        )
    if o.classes:
        refuse(o, ("class_balance",), "--classes already determines the classes")
        if not model.num_classes:
            raise UserError("this model is unconditional", got="--classes", fix="leave it out")
        turn = torch.tensor([class_named(c, names, model.num_classes) for c in o.classes])
        check_conditioning(as_conditioning(turn), len(turn), label_spec(model.num_classes))
        return lambda first, count: as_conditioning(turn[_in_turn(first, count, len(turn))]), "given"
    if not model.num_classes:
        refuse(o, ("class_balance",), "this model is unconditional")
        return lambda first, count: as_conditioning(None), ""

    def drawn(first: int, count: int) -> Conditioning:
        how = (model.num_classes, o.seed, counts, o.class_balance)
        return as_conditioning(drawn_labels(count, *how, first=first))

    return drawn, o.class_balance if counts or o.class_balance == "uniform" else "unknown"


def _in_turn(first: int, count: int, n: int) -> torch.Tensor:
    return (first + torch.arange(count)) % n


def prompts_of(o: Options) -> list[str]:
    """The prompts that the options name, in their order; none where they name none.

    Raises:
        UserError: A file that cannot be used, or other options that determine the conditions.
    """
    texts = [*o.prompt, *(read_prompts(o.prompts) if o.prompts else [])]
    if texts:
        refuse(o, ("conditions", "classes", "class_balance"), "prompts already determine the conditions")
    return texts


def negative_of(o: Options, model: Model) -> Conditioning | None:
    """What the guidance of a teacher leads away from; None for its null conditioning.

    Raises:
        UserError: The model takes no prompts.
    """
    if not o.negative_prompt:
        return None
    return encoded_for(denoiser_in(model), [o.negative_prompt], o.device, free=False)


def takes_scale(model: Model) -> bool:
    """Whether it is a student that receives its guidance scale as an input."""
    return model.student is not None and GUIDANCE in model.conditioning_spec


def at_scale(conditioning: Conditioning, n: int, scale: float) -> Conditioning:
    """The conditioning of ``n`` samples with another guidance scale as an input of the network."""
    return Conditioning({**conditioning, GUIDANCE: torch.full((n,), scale)})


def denoiser_in(model: Model) -> Any:
    """The denoiser of a model."""
    return model.student.denoiser if model.student is not None else model.teacher


def refuse(o: Options, names: tuple[str, ...], why: str, fix: str = "leave them out") -> None:
    """Refuses options that would do nothing."""
    defaults = {f.name: f.default for f in fields(o)}
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(o, name) != defaults[name]]
    if given:
        raise UserError(why, got=", ".join(given), fix=fix)
