"""Prompts that a pipeline cuts off: noted as it encodes them, or counted without its text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from distmatch.interop.pipelines.containers import replaced
from distmatch.interop.pipelines.text_parts import text_modules
from distmatch.interop.pipelines.trace import Reached, Tracer

_LIMIT, _TEMPLATE = "max_sequence_length", "prompt_template_encode_start_idx"  # as in QwenImage
_MOST = 64  # prompts at a time
Truncated = dict[str, set[int]]
"""The numbers of prompts that are cut off, by limit: "77 tokens of tokenizer"."""


class _Watched:
    """A tokenizer that notes which texts it cuts off, and those whose encodings the pipeline cuts off.

    Args:
        inner: The tokenizer.
        name: Its name in the pipeline.
        found: Receives the numbers of the texts.
        kept: Tokens of an encoding that the pipeline keeps; None for all.
        template: Tokens of the pipeline's template before a prompt, which its encoding does not have.
        calls: Receives the name for each call that may cut off texts.
    """

    def __init__(
        self, inner: Any, name: str, found: Truncated, kept: int | None, template: int, calls: list[str]
    ) -> None:
        self._inner, self._name, self._found = inner, name, found
        self._kept, self._template, self._calls = kept, template, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = self._inner(text, *args, **kwargs)
        if kwargs.get("truncation") and isinstance(text, (str, list, tuple)):
            self._calls.append(self._name)
            limit = int(kwargs.get("max_length") or self._inner.model_max_length)
            special = kwargs.get("add_special_tokens", True)
            texts = [text] if isinstance(text, str) else list(text)
            whole = self._inner(texts, add_special_tokens=special, verbose=False)
            lengths = [len(ids) for ids in whole["input_ids"]]
            self._note(f"{limit} tokens of {self._name}", {i for i, n in enumerate(lengths) if n > limit})
            if (most := self._kept) is not None:
                rows = {i for i, n in enumerate(lengths) if min(n, limit) - self._template > most}
                self._note(f"{most} tokens of max_sequence_length", rows)
        return result

    def _note(self, limit: str, rows: set[int]) -> None:
        if rows:
            self._found.setdefault(limit, set()).update(rows)


@contextmanager
def truncation(
    pipeline: Any, options: Mapping[str, Any], calls: list[str] | None = None
) -> Iterator[Truncated]:
    """Notes which prompts of one run with these options of its call a pipeline cuts off.

    Args:
        pipeline: The pipeline.
        options: The options.
        calls: Receives the name of a tokenizer for each of its calls that may cut off prompts.
    """
    found: Truncated = {}
    noted = [] if calls is None else calls
    kept, template = None, int(getattr(pipeline, _TEMPLATE, 0))
    if template:  # such pipelines keep so many tokens of the encoding, and let the tokenizer make more
        default = inspect.signature(type(pipeline).__call__).parameters.get(_LIMIT)
        kept = options.get(_LIMIT, None if default is None else default.default)
    own = {n: p for n, p in pipeline.components.items() if hasattr(p, "get_vocab") and callable(p)}
    try:
        for name, part in own.items():
            object.__setattr__(pipeline, name, _Watched(part, name, found, kept, template, noted))
        yield found
    finally:
        for name, part in own.items():
            object.__setattr__(pipeline, name, part)


def truncation_warnings(found: Mapping[str, set[int]], total: int) -> list[str]:
    """One sentence for the prompts that are cut off, at whichever limits these are.

    Args:
        found: Their numbers by limit.
        total: How many prompts there are.
    """
    limits: dict[frozenset[int], list[str]] = {}
    for limit, rows in sorted(found.items()):
        limits.setdefault(frozenset(rows), []).append(limit)
    return [
        f"{len(rows)} of {total} prompts {'is' if len(rows) == 1 else 'are'} longer than the "
        f"{' and the '.join(names)}, and {'is' if len(rows) == 1 else 'are'} truncated there, as the "
        "pipeline does"
        for rows, names in limits.items()
    ]


def count_truncated(tracer: Tracer, prompts: Sequence[str]) -> Truncated:
    """Which prompts a pipeline cuts off, found by its tokenizers; its text encoders run for one prompt only.

    A run ends with the last call of a tokenizer. Encoders that are called before it return what they returned
    for the empty prompt.
    """
    pipeline, modules = tracer.pipeline, text_modules(tracer.pipeline)
    calls: list[str] = []
    returned: list[Any] = []
    hooks = [m.register_forward_hook(lambda *call: returned.append(call[-1])) for m in modules.values()]
    try:
        with truncation(pipeline, tracer.options, calls):
            tracer.arguments([""])
    finally:
        for hook in hooks:
            hook.remove()
    cut: Truncated = {}
    most = len(calls)
    for begin in range(0, len(prompts) if most else 0, _MOST):
        part = list(prompts[begin : begin + _MOST])
        calls.clear()
        with (
            truncation(pipeline, tracer.options, calls) as found,
            _standing_in(modules.values(), returned, calls, most, len(part)),
        ):
            tracer.call(part, num_inference_steps=2, output_type="latent")
        for limit, rows in found.items():
            cut.setdefault(limit, set()).update(begin + row for row in rows)
    return cut


@contextmanager
def _standing_in(
    modules: Iterable[nn.Module], returned: Sequence[Any], calls: Sequence[str], most: int, n: int
) -> Iterator[None]:
    """Text encoders that return for ``n`` prompts what was recorded, until ``most`` calls were made."""
    left = iter(returned)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(calls) >= most:
            raise Reached
        return _repeated(next(left), n)

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, {"forward": forward}))
        yield


def _repeated(value: Any, n: int) -> Any:
    """What a module returned for one sample, for ``n`` equal ones."""
    if isinstance(value, Tensor):
        return value.repeat(n, *[1] * (value.ndim - 1)) if value.ndim else value
    if isinstance(value, Mapping):
        return type(value)(**{name: _repeated(item, n) for name, item in value.items()})
    return type(value)(_repeated(item, n) for item in value) if isinstance(value, (list, tuple)) else value
