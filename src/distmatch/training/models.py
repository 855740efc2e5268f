"""Opening what the user names as a model: a student, a teacher, or an exact mixture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.data import TOY_NAMES, Scaling, toy
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.interop import decoder_of
from distmatch.methods.student import Student, checked_labels, student_from
from distmatch.training.assess import HEUN, Drawn, draw_student, draw_teacher
from distmatch.training.devices import pick_device
from distmatch.training.sampling import Sampling
from distmatch.training.teachers import open_denoiser


@dataclass
class Model:
    """A model that can be sampled.

    Attributes:
        name: What the user called it.
        student: Set for a student.
        teacher: Set for a teacher.
        scaling: Gives samples back in the user's units.
        data: Name or path of the data it was trained on; '' when unknown.
        class_names: Names of its classes, or ().
        conversion: Of a model from elsewhere, how far it is from its original; '' otherwise.
    """

    name: str
    student: Student | None
    teacher: Denoiser | None
    scaling: Scaling
    data: str
    class_names: tuple[str, ...]
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
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample; that of a decoded one where the model works on latents."""
        denoiser: Any = self.student.denoiser if self.student is not None else self.teacher
        return tuple((decoder_of(denoiser) or denoiser).shape)

    def draw(
        self,
        n: int,
        labels: Tensor | None,
        seed: int,
        sampling: Sampling = HEUN,
        *,
        batch: int = 1024,
        device: str = "auto",
        quiet: bool = False,
    ) -> Drawn:
        """Draws ``n`` samples; ``sampling`` is for teachers."""
        where = pick_device(device)
        labels = checked_labels(labels, n, self.num_classes, seed)
        if self.student is not None:
            return draw_student(self.student.to(where), n, labels, seed, batch, quiet)
        if self.teacher is None:
            raise RuntimeError("a model is a student or a teacher")
        for model in (self.teacher, sampling.reference):
            if isinstance(model, nn.Module):
                model.to(where)
        return draw_teacher(self.teacher, n, labels, seed, sampling, batch=batch, device=where, quiet=quiet)


def open_model(source: str) -> Model:
    """A model from a run folder, a model folder, or the name of an exact mixture.

    Raises:
        UserError: There is none.
    """
    if source in TOY_NAMES:
        mixture: GaussianMixture = toy(source)
        return Model(source, None, mixture, Scaling.identity(mixture.shape[0]), source, ())
    denoiser, info = open_denoiser(source)
    data = info.get("data") or {}
    shape = (decoder_of(denoiser) or denoiser).shape
    if "scaling" in data:
        scaling = Scaling.from_dict(data["scaling"])
    elif len(shape) == 1:
        scaling = Scaling.identity(shape[0])
    else:
        scaling = Scaling.for_images(-1.0, 1.0, "model space")
    student = student_from(denoiser, info) if info.get("kind") == "student" else None
    return Model(
        source,
        student,
        None if student else denoiser,
        scaling,
        str(data.get("spec", "")),
        tuple(data.get("class_names", ())),
        str(info.get("conversion", "")),
    )


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises for an output that exists, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists", fix="choose another --out, or replace it with --overwrite")
