"""What `distmatch evaluate` measures of a run folder: its models, their teacher, and students on prompts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.cli.evaluate_options import EvaluateOptions
from distmatch.cli.imported import imported
from distmatch.cli.output import tell_conversion
from distmatch.data import load_data
from distmatch.data.columns import columns_of
from distmatch.metrics.notes import notes_on
from distmatch.training.evaluation import evaluate_models
from distmatch.training.models import Model, open_model
from distmatch.training.prompt_reference import (
    PromptReference,
    guided_as,
    images_in,
    prompts_of_run,
    reference_on_prompts,
)
from distmatch.training.runfolder import RunFolder
from distmatch.training.sampling import Sampling
from distmatch.training.shared_draw import shared_features

if TYPE_CHECKING:
    from distmatch.cli.evaluate_options import Found


def evaluate_run(o: EvaluateOptions, ranks: Ranks) -> Found:
    """Metrics of a run's models, written to the run folder too; the feature space, the reference, remarks."""
    model = open_model(o.what, o.base, imported(o.network))
    tell_conversion(o.what, model.conversion)
    found = _on_prompts(o, model)
    if found is None:
        spec = o.data or model.data
        if not spec:
            raise UserError(f"{o.what} does not record its training data", fix="pass --data")
        data = load_data(spec, labels=bool(model.conditioning_spec), columns=columns_of(model.trained_on))
        teacher, sampling, of = _teacher_of(o, model, needed=False), _sampling(o), ""
    else:
        spec, (teacher, sampling, reference) = o.data, found
        data, of = reference.data, reference.of
    space = shared_features(o.features, data, ranks, o.feature_weights)
    metrics = evaluate_models(
        data,
        {**({"teacher": teacher} if teacher is not None else {}), model.kind: model},
        RunFolder(Path(o.what)),
        features=space,
        n=o.n,
        sampling=sampling,
        seed=o.seed,
        device=o.device,
        batch=o.batch,
        spec=spec,
        of=of,
        ranks=ranks,
    )
    return metrics, space, of or spec or data.name, notes_on(data, space, metrics["reference"]["fd"].n)


def _sampling(o: EvaluateOptions) -> Sampling:
    return Sampling(solver=o.solver, steps=o.steps, grid=o.grid, guidance=o.guidance)


def _teacher_of(o: EvaluateOptions, model: Model, *, needed: bool) -> Model | None:
    """The teacher of a student; None where it is not found, which is an error where it is needed or named."""
    info = model.student.info if model.student is not None else {}
    name = o.teacher or o.base or str(info.get("teacher", ""))
    if model.student is None or not name:
        return None
    try:
        about = {} if o.teacher else info.get("teacher_options") or {}
        teacher = open_model(name, options={**about, **o.pipeline.given()})
    except UserError as error:
        if o.teacher or needed:
            raise
        warnings.warn(f"measured without the teacher: {error}", stacklevel=2)
        return None
    tell_conversion(name, teacher.conversion)
    return teacher


def _on_prompts(o: EvaluateOptions, model: Model) -> tuple[Model | None, Sampling, PromptReference] | None:
    """Teacher, its sampling and the reference of a student on prompts; None for other models and data."""
    info = model.student.info if model.student is not None else {}
    inner = model.student.denoiser if model.student is not None else model.teacher
    folder = images_in("", o.data, inner) if inner is not None else ""
    if not (folder or o.prompts or ("prompts" in info and not o.data)):
        return None
    if inner is None or model.prompt_encoder is None:
        raise UserError(
            f"{o.what} takes no prompts", got=f"--prompts {o.prompts}", fix="omit --prompts, and pass --data"
        )
    texts = [] if folder else prompts_of_run(info, o.prompts, o.what)
    if not (folder or o.data or model.data):
        folder = images_in(o.prompts or str(info["prompts"]["source"]), "", inner)
    teacher = _teacher_of(o, model, needed=True)
    sampling = _sampling(o)
    if teacher is not None and teacher.teacher is not None and o.guidance == 1:
        sampling = guided_as(sampling, info, teacher.teacher, o.device)
    reference = reference_on_prompts(
        teacher if model.student is not None else model,
        texts,
        folder=folder,
        spec="" if folder else o.data or model.data,
        n=o.n,
        sampling=sampling,
        seed=o.seed,
        device=o.device,
        batch=o.batch,
    )
    free = getattr(model.prompt_encoder, "free_text_encoders", None)
    if free is not None:  # the conditions of all models are encoded
        free()
    return teacher, sampling, reference
