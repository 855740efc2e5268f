"""What a preset is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

CIFAR10, IMAGENET64 = (3, 32, 32), (3, 64, 64)


class Value(NamedTuple):
    """A setting.

    Attributes:
        value: In the unit of the option.
        published: As it is published.
        place: The file of the source.
    """

    value: Any
    published: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Published settings of a method.

    Attributes:
        name: What the user types.
        method: The method that they are of.
        title: Network and data.
        shape: Of one sample there.
        source: Repository and paper.
        settings: By option: those of a method, ``steps``, ``batch``, ``precision``, ``divergence``.
        differs: What is published and cannot be set here, or is done in another way.
        text: Whether the network takes prompts.
    """

    name: str
    method: str
    title: str
    shape: tuple[int, ...]
    source: str
    settings: dict[str, Value]
    differs: tuple[str, ...]
    text: bool = False


def adam(lr: float, beta1: float, beta2: float, rates: str, betas: str) -> dict[str, Value]:
    """One learning rate of both networks, read in ``rates``, and Adam's decays, read in ``betas``."""
    return {
        "lr": Value(lr, f"{lr:g}", rates),
        "lr_fake_score": Value(lr, f"{lr:g}", rates),
        "beta1": Value(beta1, f"{beta1:g}", betas),
        "beta2": Value(beta2, f"{beta2:g}", betas),
    }


def of_run(batch: int, count: int, text: str, place: str) -> dict[str, Value]:
    """The size of a batch and the length of the run."""
    return {"batch": Value(batch, f"{batch}", place), "steps": Value(count, text, place)}
