"""From the options of `distill` to a job that is ready to start: data, teacher, method and state that fit."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distmatch.base.errors import UserError
from distmatch.base.metric_names import COMPARED
from distmatch.data import TOY_NAMES, Dataset
from distmatch.data.ahead import ahead
from distmatch.data.batches import Batch, Batches, BatchOf
from distmatch.data.prompts import read_prompts
from distmatch.diffusion.conditioning import LABEL, Conditioning, spec_of
from distmatch.diffusion.denoiser import Denoiser, require_denoiser
from distmatch.divergences import Divergence, divergence
from distmatch.interop import decoder_of, is_external
from distmatch.interop.card import GUIDANCE
from distmatch.interop.pipelines.loading import needs_tracing
from distmatch.methods.construct import build_method
from distmatch.methods.context import Context, Distiller
from distmatch.methods.initialization import frozen, has_network
from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.pairs import PairRegression, about_pairs
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.settings import GuidedSettings, RoleSettings
from distmatch.methods.student import Student
from distmatch.methods.table import resolve_method
from distmatch.training.devices import check_compile_mode, compile_network, pick_device, with_marked_steps
from distmatch.training.distill_data import check_fit, drawer, empty_batches
from distmatch.training.distill_warnings import advice, early_warnings, untried_rates
from distmatch.training.given_data import check_pipeline_data, check_pipeline_method, given_data
from distmatch.training.known_data import (
    OBSERVED,
    describe_data,
    digest_of_data,
    few_samples,
    known_data,
    without_data,
)
from distmatch.training.latent_data import as_latents
from distmatch.training.options import DistillOptions, NetOptions, RunOptions
from distmatch.training.parallel import shares_out
from distmatch.training.prepare_teacher import flips
from distmatch.training.prepare_watch import check_watchable, watch_of
from distmatch.training.presets import find_preset
from distmatch.training.processes import start_together
from distmatch.training.prompt_batches import prompt_batches, with_dropout
from distmatch.training.prompted import described_prompts, digest_of
from distmatch.training.runs import Job
from distmatch.training.segments import DATA, PROMPTS
from distmatch.training.teachers import dtype_of_base, open_teacher
from distmatch.training.trackers import check_trackers


def prepare_distillation(
    options: DistillOptions,
    teacher: Denoiser | None = None,
    data: Dataset | Conditioning | None = None,
    measure: Divergence | None = None,
    *,
    texts: Sequence[str] | None = None,
    fresh: bool = True,
    dry: bool = False,
) -> Job:
    """Builds everything a distillation needs; writes nothing but encodings to their cache.

    Args:
        options: The options.
        teacher: Used instead of ``options.teacher``.
        data: Used instead of ``options.data``. A conditioning alone is for methods that need no data.
        measure: A divergence object to use instead of ``options.divergence``.
        texts: Prompts in place of ``options.prompts``.
        fresh: Whether the state will be trained from its start. A resumed run skips fitting the first
            networks, as a checkpoint replaces them.
        dry: Whether nothing at all is written: prompts are then encoded as they are drawn, no network is
            fitted, and images are hashed only for a run that is resumed.

    Raises:
        UserError: Options, teacher and data do not go together.
    """
    run, ranks = options.run, start_together("distill", options, fresh=fresh and not dry)
    check_trackers(run.track)
    own_rows = ranks.rows(run.batch)
    encoded, data = (data, None) if isinstance(data, Conditioning) else (None, data)
    device = pick_device(run.device)
    check_compile_mode(run.compile, run.compile_mode, device)
    name = measure.name if measure is not None else options.divergence
    method, name = resolve_method(options.method, name)
    own = options.settings
    guidance = own.guidance if isinstance(own, GuidedSettings) else 1.0
    find_preset(options.preset, method.name)  # refuses one of another method
    check_watchable(options, method)
    chosen = measure if measure is not None else divergence(name)
    known: dict[str, Any] = {}
    if teacher is None:
        if not options.teacher:
            raise UserError(
                "no teacher was named",
                expected=f"--teacher with a run folder, or one of {', '.join(TOY_NAMES)}",
                fix="train one first: distmatch train --data digits --out runs/teacher",
            )
        if texts is None and options.prompts:
            read_prompts(options.prompts)  # what cannot be read is said before a pipeline is loaded
        if texts is None and data is None and encoded is None and needs_tracing(options.teacher):
            check_pipeline_method(options, method)
            check_pipeline_data(options, method, chosen.name)
        given = {**options.pipeline.given(), **dtype_of_base(options.teacher, own)}
        teacher, known = open_teacher(options.teacher, **given)
    elif options.pipeline.given():
        raise UserError(
            "the teacher is loaded already, with a size of its own",
            got=", ".join(options.pipeline.given()),
            fix="pass these options to dm.load_teacher, or the folder as the teacher",
        )
    require_denoiser(teacher)
    # Weights that are shared out wait for it on the CPU: whole they may be too large for a device.
    hollow = shares_out(run, ranks)
    home = torch.device("cpu") if hollow else device
    teacher = frozen(teacher, home, own if isinstance(own, RoleSettings) else None)
    copied = has_network(teacher) and options.net == NetOptions()
    if not copied:
        options = replace(options, net=options.net.settled(teacher.shape, device.type))
    settings, heavy = own, is_external(teacher) or bool(set(spec_of(teacher)) - {LABEL})
    if dry and heavy and isinstance(own, DMDSettings):
        settings = replace(own, pairs=min(own.pairs, run.batch))  # the time of all follows from theirs
    context = Context(
        teacher=teacher,
        method=method,
        divergence=chosen,
        settings=settings,
        total_steps=run.steps,
        device=device,
        bf16=run.precision == "bf16",
        net=None if copied else options.net.resolve(teacher.shape, device.type),
        ranks=ranks,
        hollow=hollow,
    )
    distiller = build_method(context)
    spec = options.data
    if not spec and not options.prompts and texts is None:
        about = known.get("data") or {}
        spec = str(about.get("spec", ""))
        if about.get(OBSERVED) and data is None and distiller.needs_data:
            raise UserError(
                f"{method.name} compares with real samples, of which the teacher has seen observations alone",
                got=f"a teacher trained with --observe {about[OBSERVED]}, and no --data",
                fix="name samples with --data, for example those of `distmatch sample` from the teacher; "
                "or take a method without data",
            )
    data, prompts = given_data(
        options,
        teacher,
        method,
        spec,
        needs_data=distiller.needs_data,
        data=data,
        texts=texts,
        conditioned=encoded is not None,
    )
    described = without_data(known_data(teacher)) if data is None else describe_data(data, spec)
    if prompts is not None:
        prompts = replace(prompts, data=data)
        described |= prompts.described
    conversion = _conversion(teacher, known)
    found = data
    seen: Sized | None = data if prompts is None or prompts.images is None else prompts.texts
    if data is not None and prompts is None:
        data = _fitting(teacher, data, run, device)
    check_steps(distiller, run.steps)
    digest = ""
    if not (dry and fresh) and prompts is not None and prompts.images is not None and data is None:
        digest = digest_of([prompts.images.content(i) for i in range(len(prompts.texts))])
    elif found is not None:
        digest = digest_of_data(found)
    batches: BatchOf
    cut: list[str] = []  # of prompts; a dry run has no log, and warns of them itself
    if prompts is not None:  # before other networks are made, which the text encoders leave room for
        batches = prompt_batches(prompts, teacher, options, device, dry=dry, remarks=None if dry else cut)
    elif data is not None:
        batches = Batches(data, run.batch, run.seed, flips(run, data), device)
    else:
        batches = empty_batches(teacher, run, device, encoded)
    batches = with_dropout(batches, teacher, options.encoding.prompt_dropout, run)
    draw = drawer(data, run.seed) if fresh and not dry and not copied else None
    state = distiller.init(run.seed, draw)
    ranks.broadcast(t for t in state.tensors() if not t.is_meta)
    if run.compile:
        for net in (teacher, state.student.denoiser, state.fake_score):
            if isinstance(net, nn.Module) and has_network(net):
                compile_network(getattr(net, "net", net), run.compile_mode)
    takes = bool(method.divergences)
    texts_used = described_prompts(prompts, options.prompts) if prompts is not None else {}
    info = {
        "method": method.name,
        **({"divergence": chosen.name} if takes else {}),
        "teacher": options.teacher,
        **({"teacher_options": options.pipeline.given()} if options.pipeline.given() else {}),
        "guidance": guidance,
        **{name: value for name in GUIDANCE if (value := getattr(own, name, None))},
        "seed": run.seed,
        "data": described,
        **({"prompts": texts_used} if texts_used else {}),
        **{f"teacher_{key}": text for key, text in conversion.items()},
        **{key: distiller.notes()[key] for key in (COMPARED,) if key in distiller.notes()},
    }

    def result() -> Student:
        return distiller.result(state, info)

    def mine(step: int) -> Batch:
        return batches(step, own_rows)

    def left_out() -> float:
        terms = distiller.terms if isinstance(distiller, Matching) else ()
        return sum(
            term.seconds_of(own.pairs - term.config.pairs)
            for term in terms
            if isinstance(own, DMDSettings) and isinstance(term, PairRegression)
        )

    watch = watch_of(
        options, context, distiller, student=result, state=state, batches=batches, about=described, data=found
    )
    return Job(
        verb="distill",
        options=options,
        state=state,
        step=with_marked_steps(distiller.step, run.compile_mode),
        batches=mine if options.encoding.encode == "live" else ahead(mine, device, found),
        networks={"teacher": teacher, **state.modules()}
        if isinstance(teacher, nn.Module)
        else state.modules(),
        notes={
            "method": method.name,
            "preset": options.preset,
            **({"divergence": chosen.name} if takes else {}),
            "levels": list(state.student.sigmas),
            **distiller.notes(),
            **({"prompts": texts_used["number"], PROMPTS: texts_used["sha256"]} if texts_used else {}),
            **({DATA: digest} if digest else {}),
            **({"pair_calls": own.pair_calls} if isinstance(own, DMDSettings) else {}),
            **conversion,
        },
        warnings=[
            *cut,
            *(few_samples(seen, run.batch) if seen is not None and method.family != "transport" else ()),
            *early_warnings(method, options, state),
            *untried_rates(method, options, teacher, state),
        ],
        result=result,
        save=lambda folder, student: student.save_pretrained(folder),
        show=("loss_fake", "ess", "clip_fraction") if method.has_fake_score else ("loss",),
        advise=advice,
        data=found,
        watch=watch,
        remarks=[about_pairs(own)] if heavy and isinstance(own, DMDSettings) else (),
        left_out=left_out,
    )


def check_steps(distiller: Distiller, steps: int) -> None:
    """Refuses a run that is too short.

    Raises:
        UserError: It is.
    """
    if isinstance(distiller, Matching) and steps < distiller.least_steps:
        raise UserError(
            "the student would never be updated",
            got=f"--steps {steps} with --fake-score-steps {distiller.config.fake_score_steps} and "
            f"--warmup-steps {distiller.config.warmup_steps}",
            expected=f"at least {distiller.least_steps} steps",
            fix="raise --steps",
        )


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
