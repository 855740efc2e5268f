"""Opening what the user names as a model: a student, a teacher, or an exact mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from distmatch.base.errors import UserError
from distmatch.data import TOY_NAMES, Dataset, Scaling, toy
from distmatch.data.classes import Classes, checked_conditioning
from distmatch.diffusion.conditioning import ConditioningLike, ConditioningSpec, spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.prompts import PromptEncoder, prompt_encoder_of
from distmatch.interop import HandedIn, decoder_of
from distmatch.methods.student import Student, student_from
from distmatch.training.devices import pick_device
from distmatch.training.known_data import seen_by, with_encodings
from distmatch.training.sampling import HEUN, SampleResult, Sampling, draw_student, draw_teacher
from distmatch.training.teachers import open_denoiser, takes_no_options


@dataclass
class Model:
    """A model that can be sampled.

    Attributes:
        name: What the user called it.
        student: Set for a student.
        teacher: Set for a teacher.
        scaling: Gives samples back in the user's units.
        data: Name or path of the data it was trained on; '' when unknown.
        trained_on: What it keeps of these data, see :func:`~distmatch.training.known_data.describe_data`.
        conversion: Of a model from elsewhere, how far it is from its original; '' otherwise.
    """

    name: str
    student: Student | None
    teacher: Denoiser | None
    scaling: Scaling
    data: str
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    conversion: str = ""

    @property
    def kind(self) -> str:
        """``student`` or ``teacher``."""
        return "student" if self.student is not None else "teacher"

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when unconditional."""
        if self.student is not None:
            return self.student.num_classes
        return self.teacher.num_classes if self.teacher is not None else 0

    @property
    def conditioning_spec(self) -> ConditioningSpec:
        """The conditions that it takes."""
        model = self.student if self.student is not None else self.teacher
        return {} if model is None else spec_of(model)

    @property
    def prompt_encoder(self) -> PromptEncoder | None:
        """What makes its conditioning of prompts; None where it takes none."""
        model: Any = self.student if self.student is not None else self.teacher
        return prompt_encoder_of(model)

    @property
    def classes(self) -> Classes:
        """Names of its classes and their counts in the training data."""
        return Classes.from_dict(self.trained_on, self.num_classes)

    def seen(self, data: Dataset) -> Dataset:
        """The data with this model's numbers of classes, scaling of columns and encoding of captions.

        Raises:
            UserError: They have classes that it does not have.
        """
        data = seen_by(data, self.trained_on, self.num_classes, f"the {self.kind}")
        return with_encodings(data, self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample; that of a decoded one where the model works on latents."""
        denoiser: Any = self.student.denoiser if self.student is not None else self.teacher
        return tuple((decoder_of(denoiser) or denoiser).shape)

    def draw(
        self,
        n: int,
        conditioning: ConditioningLike,
        seed: int,
        sampling: Sampling = HEUN,
        *,
        batch: int = 1024,
        device: str = "auto",
        first: int = 0,
    ) -> SampleResult:
        """Draws ``n`` samples; ``sampling`` is for teachers. Constant columns of vectors are constant.

        They are numbers ``first``, ``first + 1``, ... of the seed, the same as in a larger set.
        """
        where = pick_device(device)
        model: Any = self.student if self.student is not None else self.teacher
        asked = checked_conditioning(conditioning, n, model, seed, self.classes.counts, first=first)
        if self.student is not None:
            drawn = draw_student(self.student.to(where), n, asked, seed, batch, first)
            return replace(drawn, x=self.scaling.settled(drawn.x))
        if self.teacher is None:
            raise RuntimeError("a model is a student or a teacher")
        for model in (self.teacher, sampling.reference):
            if isinstance(model, nn.Module):
                model.to(where)
        how: dict[str, Any] = {"batch": batch, "device": where, "first": first}
        drawn = draw_teacher(self.teacher, n, asked, seed, sampling, **how)
        return replace(drawn, x=self.scaling.settled(drawn.x))


def open_model(
    source: str, base: str = "", network: HandedIn | None = None, options: Mapping[str, Any] | None = None
) -> Model:
    """A model from a run folder, a model folder, or the name of an exact mixture.

    Args:
        source: The folder or name.
        base: Where the base of a student of adapters is; '' looks where it was.
        network: For a model of a network of the user's: see :func:`distmatch.interop.load_denoiser`.
        options: For a folder of diffusers: see :func:`~distmatch.training.teachers.open_denoiser`.

    Raises:
        UserError: There is none.
    """
    if base and source in TOY_NAMES:
        raise UserError(f"{source} is a formula without a base", fix="omit --base")
    if source in TOY_NAMES:
        if options:
            raise takes_no_options(source, options)
        mixture: GaussianMixture = toy(source)
        return Model(source, None, mixture, Scaling.identity(mixture.shape[0]), source)
    given: dict[str, Any] = {"base": base} if base else {}
    given |= {"network": network} if network is not None else {}
    given |= options or {}
    denoiser, info = open_denoiser(source, **given)
    data = info.get("data") or {}
    scaling = Scaling.known(data, (decoder_of(denoiser) or denoiser).shape)
    student = student_from(denoiser, info) if info.get("kind") == "student" else None
    return Model(
        source,
        student,
        None if student else denoiser,
        scaling,
        str(data.get("spec", "")),
        data,
        str(info.get("conversion", "")),
    )


def refuse_existing(path: Path, overwrite: bool, option: str = "--out") -> None:
    """Raises for an output that exists, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists", fix=f"choose another {option}, or replace it with --overwrite")
