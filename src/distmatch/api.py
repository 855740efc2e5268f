"""The Python interface: train, load_teacher, distill, compare, evaluate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.progress import quietly
from distmatch.data import Dataset
from distmatch.data.classes import names_of, share_warning
from distmatch.data.prompts import has_captions
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import Divergence
from distmatch.methods.initialization import Network, check_saveable
from distmatch.methods.student import Student
from distmatch.methods.table import find_method
from distmatch.metrics import evaluate as _evaluate
from distmatch.metrics.spaces import FeatureChoice
from distmatch.report import build_report
from distmatch.training import prepare, prepare_teacher, runs, teachers
from distmatch.training.arguments import (
    Data,
    as_dataset,
    as_samples,
    drawn_from,
    name_of,
    real_data,
    settings_of,
)
from distmatch.training.auto import choose, note
from distmatch.training.comparison.options import CompareOptions, SharedOptions
from distmatch.training.comparison.run import carry_out_comparison, prepare_comparison
from distmatch.training.known_data import name_of_data
from distmatch.training.options import (
    DistillOptions,
    NetOptions,
    RunOptions,
    TeacherConfig,
    TrainOptions,
)
from distmatch.training.pipeline_options import EncodingOptions, PipelineOptions
from distmatch.training.presets import LAPTOP
from distmatch.training.runfolder import check_usable, create, create_together
from distmatch.training.watch_options import WatchOptions


def load_teacher(source: str | os.PathLike[str], **options: Any) -> Denoiser:
    """A teacher, frozen, on the CPU.

    Args:
        source: A run folder or model folder; a folder of diffusers; a network pickle of EDM or EDM2, which is
            read without running it; or the name of an exact teacher: ``ring8``, ``grid25``, ``skewed2``.
        options: For a folder of diffusers, those of :func:`distmatch.interop.load_diffusers`, or for a
            pipeline with prompts those of :func:`distmatch.interop.load_pipeline`. For a model
            with a network of your own, ``network``: the module, its class, or a denoiser around it.

    Raises:
        UserError: There is none, or the folder holds a student.
    """
    return teachers.load_teacher(source, **options)


def train(
    data: Data,
    *,
    steps: int = 3000,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    auto: bool = False,
    **settings: Any,
) -> Network:
    """Trains a diffusion teacher.

    Args:
        data: A :class:`Dataset`, samples (images N, C, H, W or N, H, W[, C]; vectors N, D), a name or a path.
        steps: Training steps.
        seed: Seed of everything random.
        out: A run folder to write, as `distmatch train` does; None keeps everything in memory.
        quiet: Whether to hide the progress.
        auto: Whether to choose settings that are not given for this machine, as ``--auto`` does.
        **settings: Any field of :class:`RunOptions`, :class:`NetOptions`, :class:`WatchOptions` or
            :class:`TeacherConfig`.

    Returns:
        The teacher (the average of its weights), a Denoiser.

    Raises:
        UserError: Unknown settings, or data that cannot be used.
    """
    run, net, watch, teacher = settings_of(
        settings, RunOptions(steps=steps, seed=seed), NetOptions(), WatchOptions(), TeacherConfig()
    )
    options = TrainOptions(data=name_of(data), run=run, net=net, watch=watch, teacher=teacher)
    _check_kept(watch, out)
    with quietly(quiet):
        found = as_dataset(data)

        def build(options: TrainOptions, fresh: bool = False) -> runs.Job:
            return prepare_teacher.prepare_training(options, found, fresh=fresh)

        options, choices = choose(options, build, fixed=settings) if auto else (options, [])
        job = build(options, True)
        note(job, choices)
        model = _carried_out(job, out, [])
    if out is not None:
        model.loaded_from = (os.path.abspath(out), {})
    return model


def distill(
    teacher: Denoiser | str | os.PathLike[str],
    data: Data | Conditioning | None = None,
    *,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    divergence: str | Divergence | None = None,
    method: str | None = None,
    preset: str = LAPTOP,
    steps: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    auto: bool = False,
    **settings: Any,
) -> Student:
    """Distils a teacher into a one-step (or few-step) student.

    Args:
        teacher: Any :class:`~distmatch.diffusion.denoiser.Denoiser`, or what :func:`load_teacher` takes.
        data: Real samples for the density ratio and the adversarial term, as for :func:`train`. Vectors for a
            teacher that was not trained here are taken as they are, unscaled. None takes samples of an exact
            teacher, or the data that a teacher says it was trained on, by name or path. For a method that
            needs no data also a :class:`Conditioning` alone: encoded prompts, whose rows are drawn.
        prompts: For a teacher that takes them: a list of texts, or the path of a file or folder as for
            :func:`distmatch.data.prompts.read_prompts`. One for each sample of ``data``, or alone.
        divergence: A name such as ``"js"``, ``"kl"``, ``"alpha:0.5"``, or a :class:`Divergence`; None is the
            method's own (JS for f-distill).
        method: ``f-distill``, ``dmd2``, ``sid``, ``uni-instruct``, ``rcm``, ...: see ``docs/methods.md``;
            None takes that of the preset, or ``f-distill``.
        preset: ``laptop``, the defaults for small networks, or published settings such as
            ``paper:sid-cifar10``: see ``docs/presets.md``. All other arguments win over it.
        steps: Training steps; None takes those of the preset, or 2000.
        seed: Seed of everything random.
        out: A run folder to write, as `distmatch distill` does; None keeps everything in memory.
        quiet: Whether to hide the progress.
        auto: Whether to choose settings that are not given for this machine, as ``--auto`` does.
        **settings: Any field of :class:`RunOptions`, :class:`NetOptions`, :class:`WatchOptions`, of the
            method's own settings (``METHODS[method].settings``), :class:`PipelineOptions` or
            :class:`EncodingOptions`; omitted settings are those of the preset or have their default.

    Returns:
        The student (the average of its weights).

    Raises:
        UserError: Unknown settings, or parts that do not go together.
    """
    given = None if isinstance(teacher, (str, os.PathLike)) else teacher
    if data is None and prompts is None and given is not None:
        data = name_of_data(given)
    texts = None if prompts is None or isinstance(prompts, (str, os.PathLike)) else list(prompts)
    own = DistillOptions.of(method, preset)
    if steps is None:
        steps = 2000 if own.run.steps == RunOptions().steps else own.run.steps
    run, net, pipeline, encoding, watch, chosen = settings_of(
        settings,
        replace(own.run, steps=steps, seed=seed),
        *(NetOptions(), PipelineOptions(), EncodingOptions(), WatchOptions(), own.settings),
        method=find_method(own.method),
    )
    source = os.fspath(teacher) if isinstance(teacher, (str, os.PathLike)) else ""
    measure = divergence if isinstance(divergence, Divergence) else None
    options = DistillOptions(
        data="" if data is None or isinstance(data, Conditioning) else name_of(data),
        teacher=source,
        method=own.method,
        preset=preset,
        divergence=measure.name if measure else divergence or own.divergence,  # type: ignore[arg-type]
        pipeline=pipeline,
        prompts="" if prompts is None or texts is not None else os.fspath(prompts),  # type: ignore[arg-type]
        encoding=encoding,
        run=run,
        net=net,
        watch=watch,
        settings=chosen,
    )
    if out is not None:
        check_saveable(given)
    _check_kept(watch, out)
    found: Dataset | Conditioning | None = None
    if isinstance(data, Conditioning):
        found = data
    elif not (isinstance(data, (str, os.PathLike)) and has_captions(Path(data))):
        found = real_data(given, data, seed)  # how images with captions are read depends on the teacher
    with quietly(quiet):

        def build(options: DistillOptions, probe: bool = True) -> runs.Job:
            return prepare.prepare_distillation(
                options, given, found, measure, texts=texts, fresh=not probe, dry=probe
            )

        options, choices = choose(options, build, fixed=settings) if auto else (options, [])
        job = build(options, probe=False)
        note(job, choices)
        return _carried_out(job, out, [source] if source else [])


def compare(
    teacher: Denoiser | str | os.PathLike[str],
    data: Data | None = None,
    *,
    methods: str | Sequence[str],
    out: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    budget: str = "2000 steps",
    seeds: int = 3,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Distils a teacher by several methods at the same budget and measures all on the same latents.

    Args:
        teacher: As for :func:`distill`.
        data: As for :func:`distill`; students are measured against them too.
        prompts: As for :func:`distill`. Without images students are measured against samples of the teacher.
        methods: Such as ``["dmd2", "f-distill:js", "strong=f-distill:js[gan_weight=0.03]"]``, or one text
            with commas.
        out: The folder of the comparison: a run folder for each method and seed, ``compare.json``,
            ``report.html``.
        budget: Of every run: a time (``"5m"``), network calls (``"200k calls"``) or steps.
        seeds: Runs of each method.
        resume: Continue the run in ``out``.
        quiet: Whether to hide the progress.
        **settings: Any other field of :class:`CompareOptions`; or a setting as for :func:`distill`, which
            every method gets that reads it.

    Returns:
        The content of ``compare.json``: means with errors, differences, fronts, costs, and every run.

    Raises:
        UserError: Unknown settings, or a method that cannot be used here; nothing is trained then.
    """
    given = None if isinstance(teacher, (str, os.PathLike)) else teacher
    if data is None and prompts is None and given is not None:
        data = name_of_data(given)
    texts = None if prompts is None or isinstance(prompts, (str, os.PathLike)) else list(prompts)
    shared = SharedOptions()
    text = methods if isinstance(methods, str) else ",".join(methods)
    first = CompareOptions(methods=text, budget=budget, seeds=seeds)
    options, run, net, pipeline, encoding, chosen = settings_of(
        settings, first, shared.run, shared.net, shared.pipeline, shared.encoding, shared.settings
    )
    shared = SharedOptions(
        teacher=os.fspath(teacher) if isinstance(teacher, (str, os.PathLike)) else "",
        data=name_of(data) if data is not None else "",
        pipeline=pipeline,
        prompts="" if prompts is None or texts is not None else os.fspath(prompts),  # type: ignore[arg-type]
        encoding=encoding,
        run=run,
        net=net,
        settings=chosen,
    )
    captioned = isinstance(data, (str, os.PathLike)) and has_captions(Path(data))
    found = None if captioned else real_data(given, data, shared.run.seed)
    inputs = [shared.teacher] if shared.teacher else []
    check_saveable(given)
    check_usable(out, resume=resume, inputs=inputs)
    with quietly(quiet):
        prepared = prepare_comparison(
            replace(options, shared=shared), given, found, texts, resumed=Path(out) if resume else None
        )
        with create(out, resume=resume, inputs=inputs) as folder:
            record = carry_out_comparison(prepared, folder)
            build_report(folder.path)
    return record


def evaluate(
    x: Tensor | np.ndarray | Student,
    reference: Data,
    *,
    labels: Tensor | None = None,
    features: FeatureChoice = "auto",
    n: int | None = None,
    seed: int = 0,
    mixture: GaussianMixture | None = None,
    quiet: bool = False,
) -> dict[str, Estimate]:
    """Measures generated samples against real ones; see :func:`distmatch.metrics.evaluate`.

    Args:
        x: Samples in model space, as ``student.sample`` gives them; or a :class:`Student`, from which as many
            samples are drawn with ``seed`` as the reference has (at most two blocks), with its class
            proportions.
        reference: A :class:`Dataset`, a tensor in model space, a name or a path.
        labels: The requested labels, as indices of the reference's classes. A warning is given where their
            proportions differ from those of the reference.
        features: ``auto``, ``classifier``, ``pixels``, or a function of samples.
        n: Largest block size.
        seed: Chooses the blocks.
        mixture: The exact mixture behind the reference, for mode metrics.
        quiet: Whether to hide the progress.

    Raises:
        UserError: ``x`` is no samples and no student, or does not fit the reference.
    """
    if not isinstance(x, Student):
        x = as_samples(x)
    shape = x.shape if isinstance(x, Student) else x.shape[1:]
    real = (
        reference if isinstance(reference, (Tensor, Dataset)) else as_dataset(reference, shape=tuple(shape))
    )
    if isinstance(x, Student):
        x, labels, real = drawn_from(x, real, labels, n, seed)
    known = real.labels if isinstance(real, Dataset) else None
    if labels is not None and known is not None and isinstance(real, Dataset):
        warning = share_warning(labels, known, names_of(real))
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
    with quietly(quiet):
        return _evaluate(x, real, labels=labels, features=features, n=n, seed=seed, mixture=mixture)


def _check_kept(watch: WatchOptions, out: str | os.PathLike[str] | None) -> None:
    """Refuses to keep the best checkpoint of a run without a folder.

    Raises:
        UserError: It is to be kept.
    """
    if out is None and watch.keep_best != "none":
        raise UserError(
            "the best checkpoint is kept in a run folder",
            got=f"keep_best={watch.keep_best!r}, and no folder",
            fix="pass out=, or omit keep_best",
        )


def _carried_out(job: runs.Job, out: str | os.PathLike[str] | None, inputs: list[str]) -> Any:
    """The model of a job, with a run folder where one is wanted, which must not overwrite the inputs."""
    with_folder = create_together(out, inputs=inputs) if out is not None else None
    try:
        model, _ = runs.carry_out(job, with_folder)
    finally:
        if with_folder is not None:
            with_folder.release()
    return model
