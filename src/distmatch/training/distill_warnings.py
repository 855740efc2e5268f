"""Warnings of a distillation: before it starts, and about its logged values."""

from __future__ import annotations

from typing import Any

from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.prompts import prompt_encoder_of
from distmatch.interop import is_external
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.method import Method
from distmatch.methods.settings import FakeScoreSettings, RatioSettings
from distmatch.methods.state import DistillState
from distmatch.nets.shared import parameter_counts
from distmatch.training.options import DistillOptions, RunOptions
from distmatch.training.presets import find_preset, laptop_warning, paper_warning


def early_warnings(method: Method, options: DistillOptions, state: DistillState) -> list[str]:
    """Warnings before the run starts."""
    own, batch = options.settings, options.run.batch
    thin = None
    if isinstance(own, RatioSettings) and isinstance(own, FakeScoreSettings) and state.normalizer:
        thin = state.normalizer.thin_message(batch, options.run.steps // own.fake_score_steps)
    found = [thin] if thin else []
    if method.family == "transport" and batch != RunOptions().batch:
        found.append("--batch does nothing here: a step draws --cell-draws samples for each latent of --bank")
    if isinstance(own, DMDSettings) and own.pairs < batch:
        found.append(
            f"--pairs {own.pairs} is less than --batch {batch}: each step repeats pairs; raise --pairs"
        )
    return found


def untried_rates(
    method: Method, options: DistillOptions, teacher: Denoiser, state: DistillState
) -> list[str]:
    """A warning about learning rates that were chosen for other networks."""
    if method.family == "transport":  # which trains no network
        return []
    usual = DistillOptions.of(method.name)
    names = {"lr": "student", "lr_fake_score": "fake", "lr_discriminator": "ratio"}
    rates = {n: getattr(options.settings, n) for n, of in names.items() if of in state.optimizers}
    theirs = {name: getattr(usual.settings, name) for name in rates}
    parameters, _ = parameter_counts(state.student.denoiser)
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
        text=prompt_encoder_of(teacher) is not None,
    )
    return [warning] if warning else []


def advice(means: dict[str, Any]) -> list[str]:
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
