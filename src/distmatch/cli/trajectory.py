"""`distmatch sample --trajectory`: the picture of what a teacher predicts on its way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_write
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.trajectory import x0_trajectory
from distmatch.interop import decode_samples
from distmatch.report.trajectory import Way, trajectory_png
from distmatch.training.devices import pick_device
from distmatch.training.models import Model
from distmatch.training.sampling import Sampling

SHARES = (0.5, 0.9)


def shown(model: Model, n: int) -> int:
    """How many of ``n`` samples a picture shows: a row for each image, a path for each vector."""
    return min(n, 8 if len(model.shape) > 1 else 60)


def check_picture(path: Path, teacher: Model, n: int) -> None:
    """Refuses a picture that cannot be drawn.

    Raises:
        UserError: No teacher, too few samples, or another suffix than .png.
    """
    if teacher.teacher is None:
        raise UserError(
            "--trajectory shows the trajectory of a teacher, and a student has none",
            got=teacher.name,
            fix="pass a teacher as MODEL, or as --hybrid-teacher to see the student next to it",
        )
    if path.suffix.lower() != ".png":
        raise UserError("a trajectory is drawn as a picture", got=f"--trajectory {path}", expected=".png")
    if n < 2:
        raise UserError("the curve needs several samples", got=f"--n {n}", fix="--n 64")


def draw_trajectory(
    path: Path,
    teacher: Model,
    sampling: Sampling,
    conditioning: ConditioningLike,
    n: int,
    seed: int,
    *,
    beside: Mapping[str, Tensor],
    batch: int,
    device: str,
) -> dict[str, float]:
    """Draws the picture and returns the noise levels at which shares of the layout are determined.

    Args:
        path: The .png to write.
        teacher: Whose way is shown.
        sampling: Solver, grid and guidance.
        conditioning: Classes (n,), a conditioning, or None.
        n: Number of samples that the curves are means over; the first of them are shown.
        seed: Seed of all noise.
        beside: Further samples from the same noise, by name, those that are :func:`shown`, in model space.
        batch: Samples per batch.
        device: Where to compute.

    Raises:
        UserError: As :func:`check_picture`, and what the solver refuses.
    """
    check_picture(path, teacher, n)
    denoiser = teacher.teacher
    if denoiser is None:
        raise RuntimeError("a picture needs a teacher")
    where = pick_device(device)
    for module in (denoiser, sampling.reference):
        if isinstance(module, nn.Module):
            module.to(where)
    way = x0_trajectory(
        sampling.around(denoiser),
        n,
        sampling.levels(denoiser),
        sampling.solver,
        conditioning=conditioning,
        path=sampling.path_for(denoiser),
        seed=seed,
        batch=batch,
        device=where,
    )
    rows = shown(teacher, n)
    x0 = decode_samples(denoiser, way.x0[:, :rows].flatten(0, 1), device=where)
    images = teacher.scaling.export(x0)
    marks = {share: way.decided(share) for share in SHARES}
    drawing = Way(
        levels=way.levels.numpy(),
        x0=images.reshape(len(way.levels), rows, *images.shape[1:]),
        detail=way.open_share().numpy(),
        layout=way.open_share(layout=True).numpy(),
        marks=marks,
        beside={name: np.asarray(teacher.scaling.export(x)) for name, x in beside.items()},
    )
    atomic_write(path, trajectory_png(drawing))
    return {f"{share:g}": level for share, level in marks.items()}
