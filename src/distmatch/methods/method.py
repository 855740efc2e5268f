"""What is known of a method before it runs: settings, needs and limits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from distmatch.methods.settings import (
    DiscriminatorSettings,
    FakeScoreSettings,
    RatioSettings,
    Settings,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named method.

    Attributes:
        name: What the user types.
        family: ``matching``, ``consistency``, ``kernel`` or ``transport``: the package of its code.
        summary: One line for help texts.
        citation: Authors, year and arXiv number.
        settings: The class of its settings, whose fields are its options and whose defaults are its own. A
            method can be given nothing else.
        build: From a :class:`~distmatch.methods.context.Context` with such settings to the
            :class:`~distmatch.methods.context.Distiller` that runs the method. It imports what needs
            torch when it is called.
        limits: What it cannot do, in a sentence.
        data: Whether it needs real data.
        teacher_gradient: Whether gradients flow through the teacher's input: more memory and time.
        forward_mode: Whether it needs forward-mode derivatives of the student.
        labels_only: Why its samples may be conditioned on class labels alone; '' for any conditioning.
        divergences: ``any``; a name; or '' for a method that minimizes no f-divergence.
        default_divergence: Of those with ``any``.
    """

    name: str
    family: Literal["matching", "consistency", "kernel", "transport"]
    summary: str
    citation: str
    settings: type[Settings]
    build: Callable[[Any], Any]
    limits: str = ""
    data: Literal["no", "needed"] = "needed"
    teacher_gradient: bool = False
    forward_mode: bool = False
    labels_only: str = ""
    divergences: str = ""
    default_divergence: str = "js"

    @property
    def has_fake_score(self) -> bool:
        """Whether a fake score is trained."""
        return issubclass(self.settings, FakeScoreSettings)

    @property
    def adversarial(self) -> bool:
        """Whether an adversarial term is part of it."""
        return issubclass(self.settings, DiscriminatorSettings)

    @property
    def weighted(self) -> bool:
        """Whether a density ratio weights its gradient."""
        return issubclass(self.settings, RatioSettings)

    def options(self) -> set[str]:
        """The names of its settings."""
        return {f.name for f in fields(self.settings)}
