"""The data of a distillation: whether they fit the teacher, and batches where there are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.data import Dataset
from distmatch.data.batches import ALL, Batch, BatchOf, Pool
from distmatch.data.classes import Classes, drawn_labels
from distmatch.diffusion.conditioning import LABEL, Conditioning, check_conditioning, for_model, spec_of
from distmatch.diffusion.denoiser import Denoiser
from distmatch.methods.initialization import Draw
from distmatch.training.known_data import known_data
from distmatch.training.options import RunOptions


def check_fit(teacher: Any, data: Dataset, *, prompts: bool = False) -> None:
    """Refuses data of another shape than a teacher's, or without the labels or conditions that it needs.

    Args:
        teacher: The teacher, or a model of it: its shape, classes and conditions are read.
        data: The data, as the teacher is shown them.
        prompts: Whether prompts of the samples are encoded besides.

    Raises:
        UserError: They do not fit.
    """
    if tuple(data.shape) != tuple(teacher.shape):
        raise UserError(
            "teacher and data do not have the same shape",
            got=f"teacher {tuple(teacher.shape)}, data {tuple(data.shape)}",
            fix="use the data that the teacher was trained on",
        )
    if teacher.num_classes and data.labels is None:
        raise UserError(
            "the teacher is class-conditional and the data have no labels",
            got=f"{teacher.num_classes} classes and unlabeled {data.name}",
            fix="give labeled data, or train the teacher with --no-labels",
        )
    spec = spec_of(teacher)
    if prompts:
        return
    if missing := set(spec) - {LABEL} - set(data.conditions):
        raise UserError(
            "the data do not contain the teacher's conditioning",
            got=f"conditions {', '.join(data.conditions) or 'none'}",
            expected=", ".join(sorted(missing)),
            fix="add arrays condition_NAME to the .npz, one row for each sample",
        )
    if len(data):
        check_conditioning(for_model(teacher, data.conditioning(torch.tensor([0]))), 1, spec)


def drawer(data: Dataset | None, seed: int) -> Draw | None:
    """Clean samples to fit fresh networks on."""
    if data is None:
        return None
    gen = generator(seed, "fit-data")

    def draw(n: int) -> tuple[Tensor, Conditioning]:
        rows = torch.randint(len(data), (n,), generator=gen)
        return data.batch(rows)[0], data.conditioning(rows)

    return draw


def empty_batches(
    teacher: Denoiser, run: RunOptions, device: torch.device, prompts: Conditioning | None = None
) -> BatchOf:
    """Batches for methods that need no data: only their size and conditioning are used.

    Args:
        teacher: The teacher.
        run: Batch size and seed.
        device: Where the batches go.
        prompts: What to condition on, rows drawn at random; None draws labels.

    Raises:
        UserError: The teacher takes conditions that cannot be drawn without data, or others than the prompts.
    """
    if prompts is not None:
        rows = prompts.batch_size or 0
        check_conditioning(prompts, rows, spec_of(teacher))
        if not rows:
            raise UserError("a conditioning without rows conditions nothing", fix="leave it out")

        def drawn(step: int, part: slice = ALL) -> Batch:
            gen = generator(run.seed, f"prompts/{step}")
            chosen = torch.randint(rows, (run.batch,), generator=gen)[part]
            x = torch.zeros(len(chosen), *teacher.shape, device=device)
            return Batch(x, prompts.index(chosen).to(device), pool=Pool(rows, prompts.index))

        return drawn
    if others := set(spec_of(teacher)) - {LABEL}:
        raise UserError(
            "the conditioning of this teacher cannot be drawn without data",
            got=f"a teacher conditioned on {', '.join(sorted(others))}, and no --data",
            fix="pass --prompts, or --data with arrays condition_NAME; in Python a Conditioning as data",
        )
    counts = Classes.from_dict(known_data(teacher), teacher.num_classes).counts

    def batch(step: int, part: slice = ALL) -> Batch:
        labels = None
        if teacher.num_classes:
            labels = drawn_labels(run.batch, teacher.num_classes, run.seed, counts, stream=f"labels/{step}")[
                part
            ].to(device)
        return Batch(torch.zeros(len(range(run.batch)[part]), *teacher.shape, device=device), labels)

    return batch
