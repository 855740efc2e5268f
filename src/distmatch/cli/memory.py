"""The predicted memory of a distillation, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.base.memory import out_of_memory
from distmatch.cli.answer import print_json
from distmatch.cli.student_steps import steps_line, steps_of, without_effect
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.prompts import prompt_encoder_of
from distmatch.divergences import divergence
from distmatch.interop.pipelines import needs_tracing
from distmatch.interop.pipelines.teacher import without_weights
from distmatch.methods.context import Context
from distmatch.methods.matching.pairs import about_pairs
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.settings import NetworkSettings
from distmatch.methods.table import resolve_method
from distmatch.nets.sizes import as_json
from distmatch.training.config_format import config_text
from distmatch.training.distill_data import empty_batches
from distmatch.training.given_data import check_pipeline_data, check_pipeline_method, given_data
from distmatch.training.memory import LARGE, Memory, predict_memory
from distmatch.training.options import DistillOptions
from distmatch.training.prompt_batches import remark_truncated, size_of_encodings
from distmatch.training.teachers import dtype_of_base
from distmatch.training.toml import dataclass_to_dict


def memory_error(error: Exception, options: Any, networks: dict[str, Any]) -> UserError | None:
    """The message for a run whose memory is exhausted, with the options that help; None for another error.

    Args:
        error: What was raised.
        options: Those of the run.
        networks: Its networks by name.
    """
    full = out_of_memory(error)
    if full is None or not hasattr(options, "run"):
        return full
    run = options.run
    helps = {"--precision bf16": replace(options, run=replace(run, precision="bf16"))}
    if run.precision == "bf16":
        helps.clear()
    if run.batch > 1:
        half = run.batch // 2
        helps[f"--batch {half}"] = replace(options, run=replace(run, batch=half))
    own = getattr(options, "settings", None)
    if isinstance(own, NetworkSettings):
        twice = 2 * own.accumulate
        changes: dict[str, dict[str, Any]] = {f"--accumulate {twice}": {"accumulate": twice}}
        changes |= {} if own.checkpointing else {"--checkpointing": {"checkpointing": True}}
        changes |= {} if own.train == "lora" else {"--train lora": {"train": "lora"}}
        for name, change in changes.items():
            with suppress(UserError, ValueError):  # of settings that do not go together
                helps[name] = replace(options, settings=replace(own, **change))
    found = [f"{name}{effect}" for name, effect in _effects(options, helps, networks.get("teacher"))]
    fix = f"start again with one or more of: {'; '.join([*found, 'a smaller network'])}"
    return UserError(full.parts["what"], got=full.parts.get("got"), fix=fix)


def _effects(options: Any, helps: dict[str, Any], teacher: Any) -> list[tuple[str, str]]:
    """What changes of the options are predicted to save, the most first; without numbers for other verbs."""
    if not isinstance(options, DistillOptions) or teacher is None:
        return [(name, "") for name in helps]
    found: dict[str, int] = {}
    with suppress(Exception):  # the memory that is full may not suffice for a prediction either
        now = predict_memory(options, teacher).peak
        for name, changed in helps.items():
            with suppress(UserError):
                found[name] = now - predict_memory(changed, teacher).peak
        best = sorted((name for name in found if found[name] > 0.01 * now), key=lambda name: -found[name])
        return [(name, f" saves {_mib(found[name])} of {_mib(now)}, as predicted") for name in best]
    return [(name, "") for name in helps]


def dry_run_without_weights(options: DistillOptions, *, json: bool) -> bool:
    """Shows what a distillation of a large pipeline takes, from its configs; False for what is run instead.

    Args:
        options: The options.
        json: As one JSON object.

    Raises:
        UserError: Options, pipeline and data do not go together.
    """
    weights = sum(file.stat().st_size for file in Path(options.teacher).glob("*/*.safetensors"))
    if not needs_tracing(options.teacher) or weights < LARGE:
        return False
    method, name = resolve_method(options.method, options.divergence)
    check_pipeline_method(options, method)
    if options.prompts:  # without any, what is missing is shown
        check_pipeline_data(options, method, divergence(name).name)
    given = {**options.pipeline.given(), **dtype_of_base(options.teacher, options.settings)}
    try:
        teacher = without_weights(options.teacher, **given)
    except UserError as error:
        if "meta" not in str(error):
            raise
        return False  # a network that needs numbers to know its shapes is loaded
    memory = predict_memory(options, teacher)
    shown: dict[str, Any] = {"verb": "distill", "options": dataclass_to_dict(options)}
    shown["predicted"] = as_dict(memory)
    steps = steps_of(teacher, _levels(options, teacher))
    shown |= steps
    cut: list[str] = []
    below = [steps_line(steps), *lines(memory)]
    if isinstance(options.settings, DMDSettings):
        shown["pair_calls"] = options.settings.pair_calls
        below.append(f"pairs       {about_pairs(options.settings)}")
    try:
        texts = _prompts_of(options, teacher, memory.needs_data)
    except UserError as error:
        if options.data or options.prompts:
            raise
        shown["missing"] = str(error)
        below.append(f"missing     {error}")
    else:
        if texts is not None:
            size = size_of_encodings(options, teacher, texts)
            shown |= {"prompts": len(texts), "encodings": size}
            below.append(f"prompts     {len(texts):,}, whose encodings take {_mib(size)} on the disk")
            remark_truncated(prompt_encoder_of(teacher), texts, cut)
            below += [f"warning     {message}" for message in cut]
            shown |= {"warnings": cut} if cut else {}
    if json:
        print_json(shown)
        return True
    print(config_text("distill", options, without=without_effect(options.settings, teacher) | {"net"}))
    print("# not written: this is a dry run, which read no weights")
    for line in below:
        print(f"# {line}")
    return True


def _levels(options: DistillOptions, teacher: Denoiser) -> tuple[float, ...]:
    """The noise levels of the student's calls."""
    method, name = resolve_method(options.method, options.divergence)
    context = Context(
        teacher=teacher,
        method=method,
        divergence=divergence(name),
        settings=options.settings,
        total_steps=options.run.steps,
        device=torch.device("cpu"),
    )
    return context.sigmas


def _prompts_of(options: DistillOptions, teacher: Denoiser, needs_data: bool) -> Sequence[str] | None:
    """The prompts of a run, or None, after a look at its data."""
    method, _ = resolve_method(options.method, options.divergence)
    data, prompts = given_data(options, teacher, method, options.data, needs_data=needs_data)
    if data is None and prompts is None:
        empty_batches(teacher, options.run, torch.device("cpu"))  # refuses a conditioning that it cannot draw
    return None if prompts is None else prompts.texts


def lines(memory: Memory) -> list[str]:
    """The prediction for people."""
    found = [
        f"predicted   {name}: {_mib(size.weights)} of weights"
        + (f", {_mib(size.optimizer)} of Adam" if size.optimizer else "")
        for name, size in memory.sizes.items()
    ]
    found.append(f"predicted   gradients and activations: {_mib(memory.passes)}")
    found.append(f"predicted   {_mib(memory.peak)} at the peak")
    found += [f"pipeline    {name}: {_mib(size)} on the CPU" for name, size in memory.parts.items()]
    return found


def as_dict(memory: Memory) -> dict[str, Any]:
    """The prediction as JSON, in bytes."""
    return {
        "peak": memory.peak,
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "passes": memory.passes,
        "sizes": as_json(memory.sizes),
        "parts": memory.parts,
    }


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"
