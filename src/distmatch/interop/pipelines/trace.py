"""What a pipeline does with its network: recorded while it runs, with its guidance turned off."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, cause
from distmatch.interop.optional import import_diffusers
from distmatch.interop.pipelines.containers import bound, copied, count, replaced, stating
from distmatch.interop.pipelines.loading import load_part

Prompts = Sequence[str] | Sequence[int]
"""What a pipeline is asked for: texts, or class labels."""

_FLAGS = {
    "max_sequence_length": "max_sequence_length (--max-tokens)",
    "num_frames": "num_frames (--frames)",
    "height": "height (--size)",
    "width": "width (--size)",
}
_CLEAN = ("dpmsolver++", "sde-dpmsolver++", "data_prediction")  # algorithms that predict x0, the others noise
_OFF = (1.0, 0.0)  # where classifier-free guidance is off, by the pipelines' different conventions


@dataclass(frozen=True)
class Call:
    """One pass of the network, and what the pipeline and its scheduler made of it.

    Attributes:
        arguments: What the network received, by name.
        output: What it returned.
        model_output: What the scheduler received as its prediction, (B, *shape).
        timestep: The scheduler's time.
        sample: The noised sample as the scheduler has it, (B, *shape).
        previous: The sample after the step, (B, *shape).
        x0: The clean sample where the scheduler states it, (B, *shape).
    """

    arguments: dict[str, Any]
    output: Any
    model_output: Tensor
    timestep: float
    sample: Tensor
    previous: Tensor
    x0: Tensor | None


@dataclass
class Trace:
    """All passes of one run.

    Attributes:
        prompts: What was asked for.
        calls: One for each step.
        mu: The logarithm of a shift of the noise levels that the pipeline computed for its resolution.
    """

    prompts: Prompts
    calls: list[Call] = field(default_factory=list)
    mu: float | None = None


class Reached(Exception):
    """A run was left where enough was seen."""


class Tracer:
    """Runs a pipeline and records it.

    Args:
        pipeline: A pipeline of diffusers.
        network: The name of its denoising network.
        options: Options of its call, such as height and width.

    Raises:
        UserError: It does not take one of the options, or neither prompts nor class labels.
    """

    def __init__(self, pipeline: Any, network: str, options: Mapping[str, Any]) -> None:
        self.pipeline, self.network_name = pipeline, network
        parameters = inspect.signature(type(pipeline).__call__).parameters
        taken = set(parameters) - {"self"}
        unknown = sorted(set(options) - taken)
        if unknown:
            raise UserError(
                f"a {type(pipeline).__name__} does not take these options",
                got=", ".join(_FLAGS.get(name, name) for name in unknown),
                expected=", ".join(sorted(taken)),
                fix="omit them",
            )
        _check_size(pipeline, options)
        self.asks = next((name for name in ("class_labels", "prompt") if name in taken), "")
        if not self.asks:
            raise UserError(
                f"a {type(pipeline).__name__} takes neither prompts nor class labels",
                got=", ".join(sorted(taken)),
                fix="wrap its network yourself: dm.as_denoiser(net, ..., call=...)",
            )
        fixed: dict[str, Any] = {"use_resolution_binning": False, "true_cfg_scale": 1.0}
        utils = import_diffusers().utils
        if not (utils.is_bs4_available() and utils.is_ftfy_available()):
            # What pipelines do without these packages, with a warning each time.
            fixed["clean_caption"] = False
        self.options = {name: value for name, value in fixed.items() if name in taken} | dict(options)
        # Networks that receive the scale itself are run at the pipeline's own: it is one of their conditions.
        self.embedded = bool(getattr(self.network.config, "guidance_embeds", False))
        self.guidance: dict[str, float] = {}
        default = parameters["guidance_scale"].default if "guidance_scale" in taken else None
        if default is not None and not self.embedded and "guidance_scale" not in options:
            self.guidance = {"guidance_scale": _OFF[0]}
        self._settled = not self.guidance
        self.recorded: Any = None  # stands in for text encoders that were freed
        self._stated: torch.dtype | None = None  # the dtype that the network states, where its own is another
        # Clipping belongs to a sampler, and would hide what the network predicts.
        config = self.pipeline.scheduler.config
        plain = {name: False for name in ("clip_sample", "thresholding") if config.get(name)}
        if plain:
            self.pipeline.scheduler.register_to_config(**plain)

    @property
    def network(self) -> nn.Module:
        """The denoising network of the pipeline."""
        found: nn.Module = getattr(self.pipeline, self.network_name)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the pipeline encodes and decodes."""
        found: Any = self.network.dtype
        return self._stated or found

    def read_others_in(self, root: Path, dtype: torch.dtype) -> None:
        """Reads all parts but the network again, in a dtype of their own; the network is not run any more.

        Pipelines convert encodings and samples to the dtype of their network, so that it states this one too.
        """
        others = [n for n, part in self.pipeline.components.items() if isinstance(part, nn.Module)]
        for name in set(others) - {self.network_name}:
            object.__setattr__(self.pipeline, name, None)  # one part at a time is in memory twice
            object.__setattr__(self.pipeline, name, load_part(root, name, dtype))
        self._stated = dtype

    def guide_as(self, other: Tracer) -> None:
        """Turns guidance off as a run of another tracer of this pipeline found it to be off."""
        self.guidance, self._settled = other.guidance, other._settled

    def run(self, prompts: Prompts, steps: int = 4, *, calls: int | None = None) -> Trace:
        """Records a run with its guidance off.

        Args:
            prompts: One for each sample.
            steps: Steps of the scheduler.
            calls: The run is left after so many.

        Raises:
            UserError: The pipeline cannot be run, or its guidance cannot be turned off.
        """
        seen: list[str] = []
        for scale in (None,) if self._settled else _OFF:
            if scale is not None:
                self.guidance = {"guidance_scale": scale}
            trace, passes = self._recorded(prompts, steps, calls)
            rows = {len(call.sample) if call.sample.ndim else 1 for call in trace.calls}
            if passes == len(trace.calls) and rows == {len(prompts)} and self._one_pass(trace):
                self._settled = True
                return trace
            seen.append(f"{passes} passes in {len(trace.calls)} steps, at {self.guidance or 'its defaults'}")
        raise UserError(
            f"the guidance of this {type(self.pipeline).__name__} cannot be turned off",
            got="; ".join(seen),
            expected="one pass of the network in each step, with a row for each prompt",
            fix="pass the options that turn it off, such as guidance_scale=...",
        )

    def _one_pass(self, trace: Trace) -> bool:
        """Whether the network received as many samples as the scheduler."""
        return all(
            any(count(value) == call.sample.numel() for value in call.arguments.values())
            for call in trace.calls
        )

    def _recorded(self, prompts: Prompts, steps: int, calls: int | None) -> tuple[Trace, int]:
        trace, passes = Trace(prompts), [0]
        scheduler = self.pipeline.scheduler
        received: list[dict[str, Any]] = []
        returned: list[Any] = []
        step = type(scheduler).step.__get__(scheduler)
        converted: list[Tensor | None] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received.append(copied(bound(module, args, kwargs)))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            returned.append(copied(output))
            passes[0] += 1

        def stepped(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(step).bind(*args, **kwargs)
            whole = "return_dict" in inspect.signature(step).parameters
            plain = whole and given.arguments.get("return_dict", True) is False
            output, time, sample = (given.arguments[k] for k in ("model_output", "timestep", "sample"))
            record = {"model_output": output.clone(), "timestep": float(time), "sample": sample.clone()}
            if whole:
                given.arguments["return_dict"] = True
            converted.clear()
            result = step(*given.args, **given.kwargs)
            x0 = getattr(result, "pred_original_sample", None)
            x0 = converted[0] if x0 is None and converted else x0
            previous = result[0]
            if received and returned:
                trace.calls.append(
                    Call(received[-1], returned[-1], **record, previous=previous.clone(), x0=copied(x0))
                )
            if calls is not None and len(trace.calls) >= calls:
                raise Reached
            return result.to_tuple() if plain else result

        def convert(*args: Any, **kwargs: Any) -> Any:
            result = type(scheduler).convert_model_output(scheduler, *args, **kwargs)
            converted.append(_x0_of(scheduler, result, kwargs.get("sample")))
            return result

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            trace.mu = None if kwargs.get("mu") is None else float(kwargs["mu"])
            return type(scheduler).set_timesteps(scheduler, *args, **kwargs)

        changes: dict[str, Any] = {"step": stepped}
        if hasattr(scheduler, "convert_model_output"):
            changes["convert_model_output"] = convert
        if "mu" in inspect.signature(type(scheduler).set_timesteps).parameters:
            # Pipelines look for its arguments.
            set_timesteps.__signature__ = inspect.signature(scheduler.set_timesteps)  # type: ignore[attr-defined]
            changes["set_timesteps"] = set_timesteps
        handles = [
            self.network.register_forward_pre_hook(before, with_kwargs=True),
            self.network.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            with replaced(scheduler, changes):
                self.call(prompts, num_inference_steps=steps, output_type="latent")
        finally:
            for handle in handles:
                handle.remove()
        return trace, passes[0]

    def arguments(self, prompts: Prompts, steps: int = 2) -> dict[str, Any]:
        """What the network receives first for these prompts; it is not run.

        Two steps are the fewest that every scheduler takes: some stretch their levels between two ends.
        """
        found: list[dict[str, Any]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(copied(bound(module, args, kwargs)))
            raise Reached

        handle = self.network.register_forward_pre_hook(before, with_kwargs=True)
        try:
            self.call(prompts, num_inference_steps=steps, output_type="latent")
        finally:
            handle.remove()
        return found[0]

    @torch.no_grad()
    def call(self, prompts: Prompts, **more: Any) -> Any:
        """A plain run of the pipeline, with reproducible noise; None where it was left early.

        Raises:
            UserError: The pipeline raises an error.
        """
        device: Any = self.network.device
        for part in self.pipeline.components.values():  # where the network was moved to
            if isinstance(part, nn.Module) and part.device != device:
                part.to(device)
        noise = torch.Generator(device).manual_seed(0)
        asked = {self.asks: list(prompts)}
        if self.recorded is not None and any(prompts):
            raise RuntimeError("the text encoders were freed")
        without: Any = nullcontext() if self.recorded is None else self.recorded.instead(self, len(prompts))
        try:
            with without, stating(self.network, self._stated):
                return self.pipeline(**asked, generator=noise, **self.options, **self.guidance, **more)
        except Reached:
            return None
        except (UserError, MemoryError):
            raise
        except Exception as error:  # code of another package, with the user's options
            raise _not_run(self.pipeline, error, self.options) from error


def _not_run(pipeline: Any, error: Exception, options: dict[str, Any]) -> UserError:
    """The error of a pipeline that does not run; where a size is the reason, with one that fits."""
    name, scheduler = type(pipeline).__name__, type(pipeline.scheduler).__name__
    sides = [options[side] for side in ("height", "width") if side in options]
    if sides and (found := re.search(r"divisible by (\d+)", str(error))):
        return _no_multiple(name, sides, int(found[1]))
    if found := re.search(r"(Height|Width) \((\d+)\) .*pos_embed_max_size`: (\d+)", str(error)):
        side, positions, most = options[found[1].lower()], int(found[2]), int(found[3])
        largest = side // positions * most
        return UserError(
            f"the network of this {name} has no positions for images larger than {largest} x {largest}",
            got=" ".join(map(str, sides)),
            fix=f"--size {largest} or less, in Python height and width",
        )
    fix = f"check the options of its call, such as height and width, and its {scheduler} with diffusers"
    return UserError(f"this {name} cannot be run", got=cause(error), fix=fix)


def _check_size(pipeline: Any, options: Mapping[str, Any]) -> None:
    """Refuses sizes that a pipeline whose tokens are 2 x 2 latents would round down, some to nothing."""
    sides = [options[side] for side in ("height", "width") if options.get(side)]
    step = 2 * int(getattr(pipeline, "vae_scale_factor", 0)) if hasattr(pipeline, "_pack_latents") else 0
    if step and any(side % step for side in sides):
        raise _no_multiple(type(pipeline).__name__, sides, step)


def _no_multiple(name: str, sides: Sequence[int], step: int) -> UserError:
    near = " ".join(str(max(1, round(side / step)) * step) for side in sides)
    return UserError(
        f"this {name} takes images whose height and width are multiples of {step}",
        got=" ".join(map(str, sides)),
        fix=f"--size {near}, in Python height and width",
    )


def _x0_of(scheduler: Any, converted: Tensor, sample: Tensor | None) -> Tensor | None:
    """The clean sample by what a multistep scheduler makes of a prediction: that itself, or the noise."""
    config = scheduler.config
    if config.get("predict_x0") or config.get("algorithm_type") in _CLEAN:
        return converted.clone()
    if sample is None or config.get("use_flow_sigmas"):
        return None  # a flow begins where nothing of x0 is left in x and noise
    sigma = scheduler.sigmas[scheduler.step_index]
    return sample * (1 + sigma**2).sqrt() - sigma * converted
