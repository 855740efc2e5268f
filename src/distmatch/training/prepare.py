"""From options to a job that is ready to start: data, teacher, method and state that fit each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.data import TOY_NAMES, Dataset, load_data
from distmatch.data.batches import Batch, Batches
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.kinetic import kinetic_path_of
from distmatch.diffusion.path_core import NoisePath
from distmatch.diffusion.path_specs import KINETIC
from distmatch.divergences import Divergence, divergence
from distmatch.interop import decoder_of
from distmatch.methods.config import resolve_method
from distmatch.methods.f_distill import FDistill
from distmatch.methods.start import Draw, has_network
from distmatch.training.devices import compile_network, pick_device
from distmatch.training.latent_data import as_latents
from distmatch.training.noisy_data import with_frozen_noise
from distmatch.training.options import DistillOptions, RunOptions, TeacherConfig, TrainOptions
from distmatch.training.runs import Job
from distmatch.training.teacher import TeacherTraining
from distmatch.training.teachers import open_teacher


def describe_data(data: Dataset, spec: str) -> dict[str, Any]:
    """What a saved model keeps of its data: enough to give samples back in the user's units."""
    return {
        "spec": spec,
        "name": data.name,
        "scaling": data.scaling.to_dict(),
        "class_names": list(data.class_names),
        "samples": len(data),
        "content_hash": data.content_hash,
    }


def prepare_training(options: TrainOptions, data: Dataset | None = None) -> Job:
    """Builds everything a teacher's training needs; writes nothing.

    Raises:
        UserError: The options or the data cannot be used.
    """
    run = options.run
    device = pick_device(run.device)
    data = load_data(options.data, labels=options.labels) if data is None else data
    sigma_data, noisy, levels = _training_data(options.teacher, data, run.seed)
    method = TeacherTraining(
        config=options.teacher,
        net=options.net.resolve(data.shape),
        shape=data.shape,
        num_classes=data.num_classes,
        sigma_data=sigma_data,
        total_steps=run.steps,
        device=device,
        bf16=run.precision == "bf16",
        path=_fitted_path(options.teacher, noisy, run.seed),
    )
    state = method.init(run.seed)
    if run.compile:
        compile_network(state.denoiser.net)
    extra = {"kind": "teacher", "data": describe_data(data, options.data), "seed": run.seed}
    return Job(
        verb="train",
        options=options,
        state=state,
        step=method.step,
        batches=Batches(noisy, run.batch, run.seed, _flips(run, data), device, levels),
        networks={"teacher": state.denoiser},
        notes={
            "data": data.name,
            "samples": len(data),
            "sigma_data": state.denoiser.sigma_data,
            "path": method.objective.path.name,
            "prediction": method.objective.prediction,
        },
        warnings=method.warnings,
        finish=lambda: (state.average.module, extra),  # type: ignore[return-value,arg-type]
        show=("loss",),
    )


def _training_data(config: TeacherConfig, data: Dataset, seed: int) -> tuple[float, Dataset, Tensor | None]:
    """Standard deviation of the clean data, what is trained on, and the noise level of each sample in it."""
    noise = config.ambient_noise
    if noise == 0:
        return data.std() or 1.0, data, None
    if config.ambient_given:
        return max(data.std() ** 2 - noise**2, 0.0) ** 0.5 or 1.0, data, torch.full((len(data),), noise)
    return data.std() or 1.0, *with_frozen_noise(data, noise, config.ambient_clean, seed)


def _fitted_path(config: TeacherConfig, data: Dataset, seed: int) -> NoisePath | None:
    """The path that is made for the data, when the options ask for it."""
    if config.path != KINETIC:
        return None
    chosen = torch.randperm(len(data), generator=generator(seed, "path samples"))[:4096]
    low, high = config.sigma_min, config.sigma_max
    return kinetic_path_of(data.batch(chosen)[0], rho_min=low, rho_max=high, seed=seed)


def prepare_distillation(
    options: DistillOptions,
    teacher: Denoiser | None = None,
    data: Dataset | None = None,
    measure: Divergence | None = None,
    *,
    fresh: bool = True,
) -> Job:
    """Builds everything a distillation needs; writes nothing.

    Args:
        options: The options.
        teacher: Used instead of ``options.teacher``.
        data: Used instead of ``options.data``.
        measure: A divergence object to use instead of ``options.divergence``.
        fresh: Whether the state will be trained from its start. A resumed run skips fitting the first
            networks, as a checkpoint replaces them.

    Raises:
        UserError: Options, teacher and data do not go together.
    """
    run = options.run
    device = pick_device(run.device)
    name = measure.name if measure is not None else options.divergence
    method, name, config = resolve_method(options.method, name, options.distill)
    chosen = measure if measure is not None else divergence(name)
    known: dict[str, Any] = {}
    if teacher is None:
        if not options.teacher:
            raise UserError(
                "no teacher was named",
                expected=f"--teacher with a run folder, or one of {', '.join(TOY_NAMES)}",
                fix="train one first: distmatch train --data digits --out runs/teacher",
            )
        teacher, known = open_teacher(options.teacher)
    if isinstance(teacher, nn.Module):
        teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    distiller = FDistill(
        teacher=teacher,
        method=method,
        divergence=chosen,
        config=config,
        total_steps=run.steps,
        device=device,
        bf16=run.precision == "bf16",
        net=None if has_network(teacher) else options.net.resolve(teacher.shape),
    )
    spec = options.data or str((known.get("data") or {}).get("spec", ""))
    if data is None and spec:
        data = load_data(spec, labels=teacher.num_classes > 0)
    if data is None and distiller.needs_ratio:
        raise UserError(
            f"{method.name} needs real data, for the density ratio or the adversarial term",
            got="a teacher that does not say what it was trained on, and no --data",
            fix="pass --data, or use --method diff-instruct, which needs none",
        )
    described = {} if data is None else describe_data(data, spec)
    conversion = _conversion(teacher, known)
    if data is not None:
        data = _fitting(teacher, data, run, device)
    draw = _drawer(teacher, data, run.seed) if fresh else None
    state = distiller.init(run.seed, draw)
    if run.compile:
        for net in (teacher, state.student.denoiser, state.fake):
            if has_network(net) and isinstance(net.net, nn.Module):
                compile_network(net.net)
    batches: Callable[[int], Batch]
    if data is not None:
        batches = Batches(data, run.batch, run.seed, _flips(run, data), device)
    else:
        batches = _empty_batches(teacher, run, device)
    bins = torch.linspace(0, 1, config.ratio_bins + 1, dtype=torch.float64)
    thin = state.normaliser.thin_message(run.batch) if method.weighted else None
    extra = {
        "kind": "student",
        "levels": list(state.student.levels),
        "method": method.name,
        "divergence": chosen.name,
        "teacher": options.teacher,
        "guidance": config.guidance,
        "seed": run.seed,
        "data": described,
        **{f"teacher_{key}": text for key, text in conversion.items()},
    }
    return Job(
        verb="distill",
        options=options,
        state=state,
        step=distiller.step,
        batches=batches,
        networks={"teacher": teacher, **state.modules()}
        if isinstance(teacher, nn.Module)
        else state.modules(),
        notes={
            "method": method.name,
            "divergence": chosen.name,
            "levels": list(state.student.levels),
            "sigma_bins": distiller.noise.quantile(bins).tolist(),
            **conversion,
        },
        warnings=[thin] if thin else [],
        finish=lambda: (state.average.module, extra),  # type: ignore[return-value,arg-type]
        show=("loss_fake", "ess", "clip_fraction"),
        advise=_advice,
    )


def _advice(means: dict[str, Any]) -> list[str]:
    """What a distillation's diagnostics say, in words."""
    advice = []
    if means.get("clip_fraction", 0.0) > 0.15:
        advice.append(
            "more than 15% of the log ratios are clipped: the discriminator tells real from generated "
            "samples too easily. Raise --noise-low, lower --lr-ratio, or raise --gan-weight."
        )
    if means.get("ess", 1.0) < 0.1:
        advice.append(
            "the weights leave less than 10% of the batch in effect. Use a larger --batch, a smaller "
            "--ratio-clip, or a divergence with bounded weights such as js."
        )
    return advice


def _flips(run: RunOptions, data: Dataset) -> bool:
    if run.flip and data.kind != "image":
        raise UserError("--flip mirrors images", got=f"{data.name}, which holds vectors", fix="leave it out")
    return run.flip


def _conversion(teacher: Denoiser, known: dict[str, Any]) -> dict[str, str]:
    """How far a teacher from elsewhere is from its original; nothing for another."""
    found = known.get("conversion") or getattr(teacher, "conversion", None)
    return {"conversion": str(found)} if found else {}


def _fitting(teacher: Denoiser, data: Dataset, run: RunOptions, device: torch.device) -> Dataset:
    """The data as the teacher has them, once it is known that they fit."""
    if run.flip and decoder_of(teacher) is not None:
        raise UserError(
            "--flip mirrors images, and this teacher works on latents, which cannot be mirrored",
            fix="leave it out, or add the mirrored images to the data",
        )
    _flips(run, data)
    data = as_latents(data, teacher, run.seed, device)
    _check_fit(teacher, data)
    return data


def _check_fit(teacher: Denoiser, data: Dataset) -> None:
    if tuple(data.shape) != tuple(teacher.shape):
        raise UserError(
            "teacher and data do not have the same shape",
            got=f"teacher {tuple(teacher.shape)}, data {tuple(data.shape)}",
            fix="use the data that the teacher was trained on",
        )
    if teacher.num_classes and data.labels is None:
        raise UserError(
            "the teacher is class-conditional and the data have no labels",
            got=f"{teacher.num_classes} classes and unlabelled {data.name}",
            fix="give labelled data, or train the teacher with --no-labels",
        )
    if teacher.num_classes and data.num_classes > teacher.num_classes:
        raise UserError(
            "the data have classes that the teacher does not know",
            got=f"{data.num_classes} classes in {data.name}",
            expected=f"at most {teacher.num_classes}",
        )


def _drawer(teacher: Denoiser, data: Dataset | None, seed: int) -> Draw | None:
    """Clean samples to fit first networks on, for a teacher that is a formula."""
    if data is None or has_network(teacher):
        return None
    gen = generator(seed, "fit-data")
    return lambda n: data.batch(torch.randint(len(data), (n,), generator=gen))


def _empty_batches(teacher: Denoiser, run: RunOptions, device: torch.device) -> Callable[[int], Batch]:
    """Batches for methods that need no data: only their size and labels are used."""

    def batch(step: int) -> Batch:
        labels = None
        if teacher.num_classes:
            gen = generator(run.seed, f"labels/{step}")
            labels = torch.randint(teacher.num_classes, (run.batch,), generator=gen).to(device)
        return Batch(torch.zeros(run.batch, *teacher.shape, device=device), labels)

    return batch
