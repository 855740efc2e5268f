"""What a model keeps of the data it was trained on, and other data seen in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sized
from typing import Any

from distmatch.base.errors import UserError
from distmatch.data import Dataset, Scaling, load_data
from distmatch.data.classes import Classes, listed, matched
from distmatch.data.columns import columns_of
from distmatch.diffusion.conditioning import UNCONDITIONAL, spec_of
from distmatch.diffusion.prompts import prompt_encoder_of

_KEPT = (
    "scaling",
    "minimum",
    "maximum",
    "columns",
    "class_names",
    "class_counts",
)  # by a student that is distilled without data


OBSERVED = "observed"
"""Of a teacher that was trained from observations of its data: the forward model."""


def describe_data(data: Dataset, spec: str) -> dict[str, Any]:
    """What a saved model keeps of its data: enough to give samples back in the user's units and shares.

    Args:
        data: The data.
        spec: Name or path by which they were loaded; '' for data in memory.
    """
    vectors: dict[str, Any] = {}
    if data.scaling.kind == "vector":
        low, high = data.extremes
        vectors = {"minimum": low.tolist(), "maximum": high.tolist()}
    if data.columns:
        vectors["columns"] = [column.to_dict() for column in data.columns]
    return {
        "spec": spec,
        "name": data.name,
        "scaling": data.scaling.to_dict(),
        **vectors,
        **Classes.of(data).to_dict(),
        "samples": len(data),
        "content_hash": data.content_hash,
    }


def digest_of_data(data: Dataset) -> str:
    """A sha256 (hex) of samples, labels, captions and conditions, the same on all machines.

    What encoders made of captions is not part of it, as it depends on a machine's rounding.
    """
    if data.prompt_encoder is not None:
        data = dataclasses.replace(data, conditions=UNCONDITIONAL, prompt_encoder=None)
    return data.content_hash


def remember(denoiser: Any, about: Mapping[str, Any]) -> None:
    """Notes on a model in memory what :func:`describe_data` says of its data."""
    denoiser.trained_on = dict(about)


def known_data(denoiser: Any) -> dict[str, Any]:
    """What a model in memory, or the one inside a wrapper, was trained on; empty where nothing is known."""
    while denoiser is not None:
        about = vars(denoiser).get("trained_on") if hasattr(denoiser, "__dict__") else None
        if about:
            return dict(about)
        denoiser = getattr(denoiser, "inner", None)
    return {}


def name_of_data(denoiser: Any) -> str | None:
    """Name or path of the data that a model in memory was trained on, where these are still there.

    None where it says none, or where what the name gives now are other data: those it was trained on may have
    had no file, or a part of one.
    """
    about = known_data(denoiser)
    spec = str(about.get("spec") or "")
    try:
        found = load_data(spec, labels=bool(spec_of(denoiser)), columns=columns_of(about)) if spec else None
    except UserError:
        return None
    return spec if found is not None and found.content_hash == about.get("content_hash") else None


def few_samples(data: Sized, batch: int) -> list[str]:
    """A warning where a batch is larger than the data; nothing otherwise."""
    if len(data) >= batch:
        return []
    times = batch / len(data)
    often = f"about {times:.0f} times" if times >= 1.5 else "once or twice"
    return [
        f"{len(data)} samples, and a batch of {batch}: every step uses each of them {often}, and a "
        f"model memorizes so few samples. Use more data, or --batch {len(data)} or less to save time"
    ]


def without_data(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a student takes over from its teacher's data when it is distilled without any."""
    return {key: about[key] for key in _KEPT if key in about}


def seen_by(data: Dataset, about: Mapping[str, Any], num_classes: int, whose: str) -> Dataset:
    """Data with the class numbers of a model, and its scaling for columns of vectors.

    Args:
        data: The data.
        about: What is known of the data that the model was trained on.
        num_classes: Classes of the model; 0 when it takes none.
        whose: Who the model is, for messages: ``the teacher``.

    Raises:
        UserError: The data have classes that the model does not have, or other columns.
    """
    data = matched(data, Classes.from_dict(about, num_classes).names, num_classes, whose)
    if data.columns and about.get("columns"):
        known = columns_of(about)
        if known != data.columns:
            raise UserError(
                f"{data.name} has other columns than the data of {whose}",
                got=listed([column.name for column in data.columns]),
                expected=f"{listed([column.name for column in known])}, in this order, with the same words",
                fix="order and name the columns alike",
            )
    if data.scaling.kind == "vector" and "scaling" in about:
        scaling = Scaling.from_dict(about["scaling"])
        if scaling.kind == "vector" and len(scaling.center) == data.shape[-1]:
            return dataclasses.replace(data, scaling=scaling)
    return data


def with_encodings(data: Dataset, model: Any) -> Dataset:
    """Data with captions as a model is conditioned on them: encoded by its own encoder."""
    encoder = prompt_encoder_of(model)
    if encoder is None or not data.captions or set(spec_of(model)) <= data.fields:
        return data
    return data.encoded_by(encoder)


def check_same_classes(one: Any, other: Any, who: str) -> None:
    """Refuses two models that number their classes differently, as far as their names are known.

    Args:
        one: A model in memory.
        other: Another one, which samples the same classes.
        who: Who they are, for the message.

    Raises:
        UserError: Both know the names of their classes, and these differ.
    """
    names = [Classes.from_dict(known_data(m), m.num_classes).names for m in (one, other)]
    if all(names) and names[0] != names[1]:
        raise UserError(
            f"{who} do not have the same classes",
            got=f"{listed(names[0])} and {listed(names[1])}",
            expected="the same names in the same order",
            fix="use models that were trained on the same classes",
        )
