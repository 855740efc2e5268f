"""From the options of `distill` to a job that is ready to start: data, teacher, method and state that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.data import TOY_NAMES, Dataset, load_data
from distmatch.data.batches import Batch, Batches
from distmatch.data.classes import Classes, drawn_labels
from distmatch.data.columns import columns_of
from distmatch.diffusion.conditioning import LABEL, Conditioning, check_conditioning, for_model, spec_of
from distmatch.diffusion.denoiser import Denoiser, require_denoiser
from distmatch.divergences import Divergence, divergence
from distmatch.interop import decoder_of, is_external
from distmatch.methods.construct import build_method
from distmatch.methods.context import Context
from distmatch.methods.initialization import Draw, frozen, has_network
from distmatch.methods.matching.loop import Matching
from distmatch.methods.method import Method
from distmatch.methods.settings import FakeScoreSettings, GuidedSettings, RatioSettings, RoleSettings
from distmatch.methods.state import DistillState
from distmatch.methods.table import resolve_method
from distmatch.training.devices import compile_network, pick_device
from distmatch.training.known_data import describe_data, few_samples, known_data, seen_by, without_data
from distmatch.training.latent_data import as_latents, check_encodable
from distmatch.training.options import DistillOptions, NetOptions, RunOptions
from distmatch.training.prepare_teacher import flips
from distmatch.training.presets import find_preset, laptop_warning, paper_warning
from distmatch.training.runs import Job
from distmatch.training.teachers import open_teacher


def prepare_distillation(
    options: DistillOptions,
    teacher: Denoiser | None = None,
    data: Dataset | Conditioning | None = None,
    measure: Divergence | None = None,
    *,
    fresh: bool = True,
) -> Job:
    """Builds everything a distillation needs; writes nothing.

    Args:
        options: The options.
        teacher: Used instead of ``options.teacher``.
        data: Used instead of ``options.data``. A conditioning alone is for methods that need no data.
        measure: A divergence object to use instead of ``options.divergence``.
        fresh: Whether the state will be trained from its start. A resumed run skips fitting the first
            networks, as a checkpoint replaces them.

    Raises:
        UserError: Options, teacher and data do not go together.
    """
    run = options.run
    prompts, data = (data, None) if isinstance(data, Conditioning) else (None, data)
    device = pick_device(run.device)
    name = measure.name if measure is not None else options.divergence
    method, name = resolve_method(options.method, name)
    own = options.settings
    guidance = own.guidance if isinstance(own, GuidedSettings) else 1.0
    find_preset(options.preset, method.name)  # refuses one of another method
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
    require_denoiser(teacher)
    teacher = frozen(teacher, device, own if isinstance(own, RoleSettings) else None)
    chosen_net = options.net != NetOptions()
    copied = has_network(teacher) and not (chosen_net and is_external(teacher))
    if copied and chosen_net:
        raise UserError(
            "the student copies the teacher's network",
            got=", ".join(f"--{name} {value}" for name, value in _given(options.net).items()),
            fix="omit these options (--net auto, if a config file has one); they are for students of "
            "exact teachers and for new networks",
        )
    if not copied:
        options = replace(options, net=options.net.settled(teacher.shape, device.type))
    distiller = build_method(
        Context(
            teacher=teacher,
            method=method,
            divergence=chosen,
            settings=own,
            total_steps=run.steps,
            device=device,
            bf16=run.precision == "bf16",
            net=None if copied else options.net.resolve(teacher.shape, device.type),
        )
    )
    spec = options.data or str((known.get("data") or {}).get("spec", ""))
    if data is None and spec:
        columns = columns_of(known_data(teacher))
        data = load_data(spec, labels=bool(spec_of(teacher)), columns=columns)
    if data is None and distiller.needs_data:
        raise UserError(
            f"{method.name} needs real data{_for_what(method)}",
            got="a teacher that does not say what it was trained on, and no --data",
            fix="pass --data, or use --method diff-instruct, which needs none",
        )
    if data is not None:
        # What does not fit is refused before anything is encoded: first the shape, which says the most.
        check_encodable(data, teacher)
        if decoder_of(teacher) is None:
            check_fit(teacher, data)
        data = seen_by(data, known_data(teacher), teacher.num_classes, "the teacher")
    described = without_data(known_data(teacher)) if data is None else describe_data(data, spec)
    conversion = _conversion(teacher, known)
    found = data
    if data is not None:
        data = _fitting(teacher, data, run, device)
    if isinstance(distiller, Matching) and run.steps < distiller.least_steps:
        raise UserError(
            "the student would never be updated",
            got=f"--steps {run.steps} with --fake-score-steps {distiller.config.fake_score_steps} and "
            f"--warmup-steps {distiller.config.warmup_steps}",
            expected=f"at least {distiller.least_steps} steps",
            fix="raise --steps",
        )
    draw = _drawer(data, run.seed) if fresh and not copied else None
    state = distiller.init(run.seed, draw)
    if run.compile:
        for net in (teacher, state.student.denoiser, state.fake_score):
            if isinstance(net, nn.Module) and has_network(net):
                compile_network(getattr(net, "net", net))
    batches: Callable[[int], Batch]
    if data is not None:
        batches = Batches(data, run.batch, run.seed, flips(run, data), device)
    else:
        batches = _empty_batches(teacher, run, device, prompts)
    takes = bool(method.divergences)
    info = {
        "method": method.name,
        **({"divergence": chosen.name} if takes else {}),
        "teacher": options.teacher,
        "guidance": guidance,
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
            "preset": options.preset,
            **({"divergence": chosen.name} if takes else {}),
            "levels": list(state.student.sigmas),
            **distiller.notes(),
            **conversion,
        },
        warnings=[
            *(few_samples(found, run.batch) if found is not None and method.family != "transport" else ()),
            *_warnings(method, options, state),
            *_untried(method, options, teacher, state),
        ],
        result=lambda: distiller.result(state, info),
        save=lambda folder, student: student.save_pretrained(folder),
        show=("loss_fake", "ess", "clip_fraction") if method.has_fake_score else ("loss",),
        advise=_advice,
        data=found,
    )


def _given(net: NetOptions) -> dict[str, Any]:
    plain = NetOptions()
    found = {field.name: getattr(net, field.name) for field in fields(net)}
    return {name: value for name, value in found.items() if value != getattr(plain, name)}


def _for_what(method: Method) -> str:
    return ", for the density ratio or the adversarial term" if method.family == "matching" else ""


def _warnings(method: Method, options: DistillOptions, state: DistillState) -> list[str]:
    """Warnings before the run starts."""
    own, batch = options.settings, options.run.batch
    thin = None
    if isinstance(own, RatioSettings) and isinstance(own, FakeScoreSettings) and state.normalizer:
        thin = state.normalizer.thin_message(batch, options.run.steps // own.fake_score_steps)
    found = [thin] if thin else []
    if method.family == "transport" and batch != RunOptions().batch:
        found.append("--batch does nothing here: a step draws --cell-draws samples for each latent of --bank")
    return found


def _untried(method: Method, options: DistillOptions, teacher: Denoiser, state: DistillState) -> list[str]:
    """A warning about learning rates that were chosen for other networks."""
    if method.family == "transport":  # which trains no network
        return []
    usual = DistillOptions.of(method.name)
    names = {"lr": "student", "lr_fake_score": "fake", "lr_discriminator": "ratio"}
    rates = {n: getattr(options.settings, n) for n, of in names.items() if of in state.optimizers}
    theirs = {name: getattr(usual.settings, name) for name in rates}
    parameters = sum(p.numel() for p in state.student.denoiser.parameters())
    if preset := find_preset(options.preset):
        if is_external(teacher):
            return []
        given = {**rates, "steps": options.run.steps}
        warning = paper_warning(preset, given, {**theirs, "steps": usual.run.steps}, parameters=parameters)
        return [warning] if warning else []
    warning = laptop_warning(
        method,
        rates,
        theirs,
        parameters=parameters,
        elsewhere=is_external(teacher),
        shape=teacher.shape,
    )
    return [warning] if warning else []


def _advice(means: dict[str, Any]) -> list[str]:
    """Warnings from a distillation's diagnostics."""
    advice = []
    if means.get("clip_fraction", 0.0) > 0.15:
        advice.append(
            "more than 15% of the log ratios are clipped: the discriminator separates real from "
            "generated samples too easily. Raise --noise-low, lower --lr-discriminator, or raise "
            "--gan-weight."
        )
    if means.get("ess", 1.0) < 0.1:
        advice.append(
            "the effective sample size of the weights is less than 10% of the batch. Use a larger "
            "--batch, a smaller "
            "--ratio-clip, or a divergence with bounded weights such as js."
        )
    return advice


def _conversion(teacher: Denoiser, known: dict[str, Any]) -> dict[str, str]:
    """How far a teacher from elsewhere is from its original; nothing for another."""
    found = known.get("conversion") or getattr(teacher, "conversion", None)
    return {"conversion": str(found)} if found else {}


def _fitting(teacher: Denoiser, data: Dataset, run: RunOptions, device: torch.device) -> Dataset:
    """The data as the teacher has them, once it is known that they fit."""
    if run.flip and decoder_of(teacher) is not None:
        raise UserError(
            "--flip mirrors images, and this teacher works on latents, which cannot be mirrored",
            fix="omit it, or add the mirrored images to the data",
        )
    flips(run, data)
    data = as_latents(data, teacher, run.seed, device)
    check_fit(teacher, data)
    return data


def check_fit(teacher: Any, data: Dataset) -> None:
    """Refuses data of another shape than a teacher's, or without the labels or conditions that it needs.

    Args:
        teacher: The teacher, or a model of it: its shape, classes and conditions are read.
        data: The data, as the teacher is shown them.

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
    if missing := set(spec) - {LABEL} - set(data.conditions):
        raise UserError(
            "the data do not contain the teacher's conditioning",
            got=f"conditions {', '.join(data.conditions) or 'none'}",
            expected=", ".join(sorted(missing)),
            fix="add arrays condition_NAME to the .npz, one row for each sample",
        )
    if len(data):
        check_conditioning(for_model(teacher, data.conditioning(torch.tensor([0]))), 1, spec)


def _drawer(data: Dataset | None, seed: int) -> Draw | None:
    """Clean samples to fit fresh networks on."""
    if data is None:
        return None
    gen = generator(seed, "fit-data")

    def draw(n: int) -> tuple[Tensor, Conditioning]:
        rows = torch.randint(len(data), (n,), generator=gen)
        return data.batch(rows)[0], data.conditioning(rows)

    return draw


def _empty_batches(
    teacher: Denoiser, run: RunOptions, device: torch.device, prompts: Conditioning | None = None
) -> Callable[[int], Batch]:
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

        def drawn(step: int) -> Batch:
            chosen = torch.randint(rows, (run.batch,), generator=generator(run.seed, f"prompts/{step}"))
            return Batch(
                torch.zeros(run.batch, *teacher.shape, device=device), prompts.index(chosen).to(device)
            )

        return drawn
    if others := set(spec_of(teacher)) - {LABEL}:
        raise UserError(
            "the conditioning of this teacher cannot be drawn without data",
            got=f"a teacher conditioned on {', '.join(sorted(others))}, and no --data",
            fix="pass --data with arrays condition_NAME, or in Python a Conditioning as data",
        )
    counts = Classes.from_dict(known_data(teacher), teacher.num_classes).counts

    def batch(step: int) -> Batch:
        labels = None
        if teacher.num_classes:
            labels = drawn_labels(
                run.batch, teacher.num_classes, run.seed, counts, stream=f"labels/{step}"
            ).to(device)
        return Batch(torch.zeros(run.batch, *teacher.shape, device=device), labels)

    return batch
