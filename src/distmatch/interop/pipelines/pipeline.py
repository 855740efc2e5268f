"""A traced pipeline of diffusers: what it encodes, decodes, and passes to its network."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.stack import caller_level
from distmatch.diffusion.conditioning import Conditioning, cat
from distmatch.interop.diffusers_schedule import Schedule
from distmatch.interop.optional import import_diffusers
from distmatch.interop.pipelines.containers import replaced
from distmatch.interop.pipelines.contract import Contract, TimeMap, fit_contract
from distmatch.interop.pipelines.levels import schedule_of, shift_of, time_map
from distmatch.interop.pipelines.loading import quiet
from distmatch.interop.pipelines.tail import Tail, trace_tail
from distmatch.interop.pipelines.text_parts import Recorded, loaded_again, text_modules
from distmatch.interop.pipelines.trace import Prompts, Reached, Trace, Tracer
from distmatch.interop.pipelines.truncated import (
    Truncated,
    count_truncated,
    truncation,
    truncation_warnings,
)

_PATHS = {"condot": "flow matching (condot): (1 - t) x0 + t eps"}
_MOST = 64  # prompts that are encoded at a time


class Pipeline:
    """A traced pipeline: it encodes prompts, decodes samples and knows the steps that it would take.

    Copies of a denoiser share it; it is no part of their parameters.

    Attributes:
        contract: How it calls its network.
        schedule: Path and prediction.
        times: The network's time as a function of the path's.
        shift: The shift of its noise levels at this resolution; None without one.
        null: The prompt that stands for "no condition".
        folder: Where it was loaded from.
        shape: Shape of one decoded sample: (channels, height, width), or (channels, frames, height, width).
    """

    def __init__(
        self,
        tracer: Tracer,
        traces: Sequence[Trace],
        null: str | int | None,
        tokens: int | None = None,
        received: Mapping[str, Any] | None = None,
    ) -> None:
        self.tracer, self.tokens = tracer, tokens
        scheduler = tracer.pipeline.scheduler
        self.schedule: Schedule = schedule_of(tracer.pipeline)
        classes = class_count(tracer)
        self.contract: Contract = self._of_one_length(fit_contract(traces, classes))
        if received is not None:
            self.contract = self.contract.in_dtypes_of(received)
        self.times: TimeMap = time_map(
            self.contract.scale, self.contract.offset, self.schedule, scheduler, traces[0]
        )
        self.shift = shift_of(scheduler, traces[0]) if self.schedule.family == "flow" else None
        self.null = null
        self.folder: Path | None = None
        self._freed: dict[str, torch.dtype] = {}
        self._output = (traces[0].calls[0].output, len(traces[0].prompts))
        self.shape = tuple(self.decode(torch.zeros(1, *self.contract.shape)).shape[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """Itself: nothing in it ever changes."""
        return self

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 (hex) of what encodings depend on: the pipeline's parts and weights, sizes and tokens.

        The weights of the denoising network, of the autoencoder and of the scheduler do not matter.
        """
        return self._fingerprint()

    def _fingerprint(self) -> str:
        parts = self.tracer.pipeline.components
        digest = hashlib.sha256(repr((type(self.tracer.pipeline).__name__, self.tokens)).encode())
        digest.update(
            repr((sorted(self.tracer.options.items()), sorted(self.contract.fields.items()))).encode()
        )
        for name in sorted(parts):
            part = parts[name]
            if name == self.tracer.network_name or name in ("vae", "scheduler") or part is None:
                continue
            digest.update(f"{name} {type(part).__name__}".encode())
            if isinstance(part, torch.nn.Module):
                for key, value in sorted(part.state_dict().items()):
                    digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            elif hasattr(part, "get_vocab"):
                digest.update(repr((sorted(part.get_vocab().items()), part.model_max_length)).encode())
        return digest.hexdigest()

    def free_text_encoders(self) -> None:
        """Frees the memory of the text encoders; a prompt that is encoded later loads them again.

        Decoding, the grid and the null conditioning need none.

        Raises:
            UserError: The pipeline encodes prompts in another way than others do.
        """
        pipeline = self.tracer.pipeline
        modules = text_modules(pipeline)
        if not modules or self._freed or self.folder is None:
            return
        self.fingerprint  # noqa: B018  # which needs their weights
        self.tracer.recorded = Recorded(pipeline, lambda n: self.tracer.arguments([""] * n))
        self._freed = {name: next(part.parameters()).dtype for name, part in modules.items()}
        for name in modules:
            object.__setattr__(pipeline, name, None)  # not by its own, which changes its config

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """A context in which prompts and images are encoded on a device."""
        network = self.tracer.network
        before = next(network.parameters()).device
        network.to(device)  # a run moves the other parts after it
        try:
            yield
        finally:
            network.to(before)

    def _with_text_encoders(self) -> None:
        """Loads text encoders again that were freed.

        Raises:
            UserError: They are not in the folder any more, or others are.
        """
        if not self._freed or self.folder is None:
            return
        for name, part in loaded_again(self.folder, self._freed).items():
            object.__setattr__(self.tracer.pipeline, name, part)
        self.tracer.recorded, self._freed = None, {}
        if self._fingerprint() != self.fingerprint:
            raise UserError(
                f"{self.folder} has changed since the pipeline was loaded",
                got="other text encoders",
                fix="load the teacher again",
            )

    def encode(self, prompts: Prompts, *, truncated: Truncated | None = None) -> Conditioning:
        """Prompts (or class labels) as what the network receives for them, one row each.

        The pipeline's own encoding runs, up to the first call of its network.

        Args:
            prompts: Texts, or class labels for a pipeline of classes.
            truncated: Receives which prompts are cut off, by limit; None warns of them.

        Raises:
            UserError: No prompts, or prompts that are encoded to different lengths when there are many.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise UserError("prompts are given as a list of one or more", got=repr(prompts)[:80])
        if any(prompts):
            self._with_text_encoders()
        parts, cut = [], truncated if truncated is not None else {}
        for begin in range(0, len(prompts), _MOST):
            with quiet(), truncation(self.tracer.pipeline, self.tracer.options) as found:
                arguments = self.tracer.arguments(prompts[begin : begin + _MOST])
            parts.append(self.fitted(self.contract.conditioning(arguments)))
            for limit, rows in found.items():
                cut.setdefault(limit, set()).update(begin + row for row in rows)
        for message in truncation_warnings(cut, len(prompts)) if truncated is None else ():
            warnings.warn(message, stacklevel=caller_level())
        shapes = [{name: tuple(value.shape[1:]) for name, value in part.items()} for part in parts]
        if other := next((shape for shape in shapes if shape != shapes[0]), None):
            raise UserError(
                "this pipeline encodes prompts to the length of the longest, which differs between them",
                got=f"{shapes[0]} and {other}",
                fix="load the teacher with a fixed number of tokens: dm.load_teacher(folder, tokens=...)",
            )
        return cat(parts)

    def truncated(self, prompts: Sequence[str]) -> Truncated:
        """Which prompts are cut off, by limit; they are not encoded."""
        self._with_text_encoders()
        with quiet():
            return count_truncated(self.tracer, prompts)

    def fitted(self, conditioning: Conditioning) -> Conditioning:
        """Fields of tokens with zeros behind them, up to the fixed number where there is one.

        Raises:
            UserError: There are more tokens.
        """
        fields = dict(conditioning)
        for name in self._of_tokens(self.contract) if self.tokens is not None else ():
            value, missing = fields[name], (self.tokens or 0) - fields[name].shape[1]
            if missing < 0:
                raise UserError(
                    "a prompt is longer than the fixed number of tokens",
                    got=f"{value.shape[1]} tokens in {name}",
                    expected=f"at most {self.tokens}",
                    fix=f"allow for as many: --tokens {value.shape[1]}, in Python tokens=; or shorten it",
                )
            fields[name] = torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, missing))
        return Conditioning(fields)

    @staticmethod
    def _of_tokens(contract: Contract) -> set[str]:
        """Fields that may have zeros behind them: lists, and what has a mask."""
        return {*contract.lists, *contract.masks, *contract.masks.values()}

    def _of_one_length(self, contract: Contract) -> Contract:
        """The contract with a fixed number of tokens."""
        if self.tokens is None:
            return contract
        names = self._of_tokens(contract)
        if not names:
            raise UserError(
                "this pipeline has no mask for its tokens, so that their number is that of the pipeline",
                got=f"tokens={self.tokens}",
                fix="leave tokens out",
            )
        fields = {
            name: replace(spec, shape=(self.tokens, *spec.shape[1:])) if name in names else spec
            for name, spec in contract.fields.items()
        }
        return replace(contract, fields=fields)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Samples of the denoiser (B, *contract.shape) as images or video, (B, *shape) in about [-1, 1].

        The end of the pipeline runs on them; its network and scheduler do not. There are no gradients.
        """
        network: Any = self.tracer.network
        scheduler = self.tracer.pipeline.scheduler
        x0 = z.to(network.device)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _zeros(*self._output, len(x0))

        def step(output: Any, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            last = x0.to(sample.dtype)  # some pipelines keep their samples in float32, others do not
            return import_diffusers().schedulers.scheduling_utils.SchedulerOutput(prev_sample=last)

        asked: list[Any] = [0 if self.tracer.asks == "class_labels" else ""] * len(x0)
        with replaced(network, {"forward": forward}), replaced(scheduler, {"step": step}):
            found = self.tracer.call(asked, num_inference_steps=2, output_type="pt")
        if found is None:
            raise Reached  # a reader of the end has seen enough
        x: Tensor = found[0]
        if x.ndim == 5:
            x = x.transpose(1, 2)  # frames come before channels
        return (2 * x.float() - 1).to(z.device)

    @cached_property
    def tail(self) -> Tail:
        """The way from samples to the autoencoder, which encodes images.

        Raises:
            UserError: It is of another form than a scaling of permuted elements.
        """
        return trace_tail(self.tracer.pipeline, self.decode, self.contract.shape, self.tracer.dtype)

    def grid(self, steps: int) -> Tensor:
        """The decreasing noise levels of the pipeline's own sampler, (steps + 1,), the last of them 0.

        Args:
            steps: Its ``num_inference_steps``.
        """
        prompts = [0] if self.tracer.asks == "class_labels" else [""]
        self.tracer.arguments(prompts, steps)
        scheduler, path = self.tracer.pipeline.scheduler, self.schedule.path
        if path is None:
            raise UserError("this pipeline has no noise path")
        if self.schedule.family == "flow":
            t = scheduler.sigmas[: len(scheduler.timesteps)].double().cpu()
        else:
            t = scheduler.timesteps.double().cpu()
        rho = path.rho(t.clamp(path.t_min, path.t_max))
        return torch.cat([rho, torch.zeros(1, dtype=torch.float64)])

    def describe(self) -> dict[str, str]:
        """The contract, for people."""
        contract, path = self.contract, self.schedule.path
        fields = {
            name: f"({', '.join('any' if n < 0 else str(n) for n in spec.shape)}) "
            f"{str(spec.dtype).removeprefix('torch.')}"
            for name, spec in contract.fields.items()
        }
        rounded = ", rounded down to integers first" if self.times.whole else ""
        rounded += f", without the shift {self.times.shift:.4g}" if self.times.shift != 1 else ""
        return {
            "pipeline": type(self.tracer.pipeline).__name__,
            "network": f"{type(self.tracer.network).__name__} ({self.tracer.network_name})",
            "sample": f"{contract.shape} as {contract.sample}{' (a list)' if contract.listed else ''}",
            "time": f"{contract.time} = {contract.scale:g} x scheduler time + {contract.offset:g}{rounded}",
            "output": contract.output,
            "conditioning": "; ".join(f"{name} {said}" for name, said in fields.items()) or "none",
            "prediction": self.schedule.prediction,
            "path": "none" if path is None else _PATHS.get(path.name, path.name),
            "shift": "none" if self.shift is None else f"{self.shift:.4g}",
            "null": "none" if self.null is None else f"the prompt {self.null!r}",
            "decoded": f"{self.shape}",
        }


def class_count(tracer: Tracer) -> int:
    """Classes of a pipeline that takes labels; 0 for one that takes prompts."""
    if tracer.asks != "class_labels":
        return 0
    config: Any = tracer.network.config
    return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)


def _zeros(output: Any, rows: int, n: int) -> Any:
    """Zeros like what a network returned for ``rows`` samples, for ``n`` of them."""
    if isinstance(output, Tensor):
        return output.new_zeros(n, *output.shape[1:])
    if isinstance(output, dict):
        return SimpleNamespace(**{name: _zeros(value, rows, n) for name, value in output.items()})
    if isinstance(output, list) and len(output) == rows:
        return [torch.zeros_like(output[0]) for _ in range(n)]
    return tuple(_zeros(value, rows, n) for value in output) if isinstance(output, tuple) else output
