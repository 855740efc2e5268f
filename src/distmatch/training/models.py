"""Opening what the user names as a model: a student, a teacher, or an exact mixture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.data import TOY_NAMES, Scaling, toy
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.methods.student import Student, checked_labels
from distmatch.nets.saved import load_model
from distmatch.training.assess import Drawn, draw_student, draw_teacher
from distmatch.training.devices import pick_device


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
    """

    name: str
    student: Student | None
    teacher: Denoiser | None
    scaling: Scaling
    data: str
    class_names: tuple[str, ...]

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
        """Shape of one sample in model space."""
        denoiser = self.student.denoiser if self.student is not None else self.teacher
        return tuple(denoiser.shape) if denoiser is not None else ()

    def draw(
        self,
        n: int,
        labels: Tensor | None,
        seed: int,
        *,
        steps: int = 18,
        guidance: float = 1.0,
        batch: int = 1024,
        device: str = "auto",
        quiet: bool = False,
    ) -> Drawn:
        """Draws ``n`` samples; ``steps`` and ``guidance`` are for teachers."""
        where = pick_device(device)
        labels = checked_labels(labels, n, self.num_classes, seed)
        if self.student is not None:
            return draw_student(self.student.to(where), n, labels, seed, batch, quiet)
        if self.teacher is None:
            raise RuntimeError("a model is a student or a teacher")
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(where)
        return draw_teacher(
            self.teacher,
            n,
            labels,
            seed,
            steps=steps,
            guidance=guidance,
            batch=batch,
            device=where,
            quiet=quiet,
        )


def open_model(source: str) -> Model:
    """A model from a run folder, a model folder, or the name of an exact mixture.

    Raises:
        UserError: There is none.
    """
    if source in TOY_NAMES:
        mixture: GaussianMixture = toy(source)
        return Model(source, None, mixture, Scaling.identity(mixture.shape[0]), source, ())
    denoiser, info = load_model(source)
    data = info.get("data") or {}
    if "scaling" in data:
        scaling = Scaling.from_dict(data["scaling"])
    elif len(denoiser.shape) == 1:
        scaling = Scaling.identity(denoiser.shape[0])
    else:
        scaling = Scaling.for_images(-1.0, 1.0, "model space")
    student = Student.from_pretrained(source) if info.get("kind") == "student" else None
    names = tuple(data.get("class_names", ()))
    return Model(source, student, None if student else denoiser, scaling, str(data.get("spec", "")), names)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises for an output that exists, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists", fix="choose another --out, or replace it with --overwrite")
