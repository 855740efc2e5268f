"""The text encoders of a pipeline: freed when all prompts are encoded, loaded again when one is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.interop.diffusers_parts import is_text_part
from distmatch.interop.pipelines.containers import replaced

_ENCODE = "encode_prompt"  # what pipelines of diffusers call their method
_LIMIT, _TEMPLATE = "max_sequence_length", "prompt_template_encode_start_idx"  # as in QwenImage
Truncated = dict[str, set[int]]
"""The numbers of prompts that are cut off, by limit: "77 tokens of tokenizer"."""


def text_modules(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by name: modules, not tokenizers."""
    return {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module) and is_text_part(n)}


class Recorded:
    """What a pipeline's ``encode_prompt`` returns for the same prompt any number of times, without encoders.

    Args:
        pipeline: The pipeline.
        run: Runs it for this number of samples, up to its network.

    Raises:
        UserError: It has no such method, or returns something that does not grow with the number of samples.
    """

    def __init__(self, pipeline: Any, run: Callable[[int], object]) -> None:
        self._runs = [_results(pipeline, run, n) for n in (1, 2)]
        if not self._runs[0] or len(self._runs[0]) != len(self._runs[1]):
            raise UserError(
                f"the text encoders of this {type(pipeline).__name__} cannot be freed",
                got=f"{len(self._runs[0])} calls of {_ENCODE} for a sample, {len(self._runs[1])} for two",
                fix="keep them: --encode live",
            )
        self.results(3)

    def results(self, n: int) -> list[Any]:
        """What the calls for ``n`` samples return, in their order."""
        return [_grown(one, two, n) for one, two in zip(*self._runs, strict=True)]

    @contextmanager
    def instead(self, tracer: Any, n: int) -> Iterator[None]:
        """A context in which the pipeline receives them for ``n`` samples."""
        left = iter(self.results(n))
        with replaced(tracer.pipeline, {_ENCODE: lambda *args, **kwargs: next(left)}):
            yield


def _results(pipeline: Any, run: Callable[[int], object], n: int) -> list[Any]:
    """What ``encode_prompt`` returns while a pipeline runs."""
    own, found = getattr(pipeline, _ENCODE, None), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(own(*args, **kwargs))  # type: ignore[misc]
        return found[-1]

    if own is not None:
        with replaced(pipeline, {_ENCODE: noted}):
            run(n)
    return found


def _grown(one: Any, two: Any, n: int) -> Any:
    """A result for n equal prompts, from those for one and for two."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape == two.shape:
            return one
        if two.shape == (2 * one.shape[0], *one.shape[1:]):
            return one.repeat(n, *[1] * (one.ndim - 1))
    elif isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two):
        return tuple(_grown(a, b, n) for a, b in zip(one, two, strict=True))
    elif isinstance(one, list) and isinstance(two, list):
        if len(two) == 2 * len(one):
            return one * n
        if len(two) == len(one):
            return [_grown(a, b, n) for a, b in zip(one, two, strict=True)]
    elif one is None and two is None:
        return None
    raise UserError(
        "the text encoders of this pipeline cannot be freed",
        got=f"a {type(one).__name__} from {_ENCODE} that does not grow with the number of prompts",
        fix="keep them: --encode live",
    )


def loaded_again(root: Path, dtypes: dict[str, torch.dtype]) -> dict[str, nn.Module]:
    """Text encoders from the folder of their pipeline, in their dtypes.

    Raises:
        UserError: They are not there any more.
    """
    from distmatch.interop.pipelines.loading import load_part

    if not root.is_dir():
        raise UserError(
            "the text encoders were freed after all prompts were encoded, and their pipeline is gone",
            got=f"no folder {root}",
            fix="restore it, or keep the text encoders: --encode live",
        )
    return {name: load_part(root, name, dtype) for name, dtype in dtypes.items()}


class _Watched:
    """A tokenizer that notes which texts it cuts off, and those whose encodings the pipeline cuts off.

    Args:
        inner: The tokenizer.
        name: Its name in the pipeline.
        found: Receives the numbers of the texts.
        kept: Tokens of an encoding that the pipeline keeps; None for all.
        template: Tokens of the pipeline's template before a prompt, which its encoding does not have.
    """

    def __init__(self, inner: Any, name: str, found: Truncated, kept: int | None, template: int) -> None:
        self._inner, self._name, self._found = inner, name, found
        self._kept, self._template = kept, template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = self._inner(text, *args, **kwargs)
        if kwargs.get("truncation") and isinstance(text, (str, list, tuple)):
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
def truncation(pipeline: Any, options: Mapping[str, Any]) -> Iterator[Truncated]:
    """Notes which prompts of one run with these options of its call a pipeline cuts off."""
    found: Truncated = {}
    kept, template = None, int(getattr(pipeline, _TEMPLATE, 0))
    if template:  # such pipelines keep so many tokens of the encoding, and let the tokenizer make more
        default = inspect.signature(type(pipeline).__call__).parameters.get(_LIMIT)
        kept = options.get(_LIMIT, None if default is None else default.default)
    own = {n: p for n, p in pipeline.components.items() if hasattr(p, "get_vocab") and callable(p)}
    try:
        for name, part in own.items():
            object.__setattr__(pipeline, name, _Watched(part, name, found, kept, template))
        yield found
    finally:
        for name, part in own.items():
            object.__setattr__(pipeline, name, part)


def truncation_warnings(found: Mapping[str, set[int]], total: int, what: str = "prompts") -> list[str]:
    """One sentence for the prompts that are cut off, at whichever limits these are.

    Args:
        found: Their numbers by limit.
        total: How many prompts there are.
        what: What these are.
    """
    limits: dict[frozenset[int], list[str]] = {}
    for limit, rows in sorted(found.items()):
        limits.setdefault(frozenset(rows), []).append(limit)
    return [
        f"{len(rows)} of {total} {what} {'is' if len(rows) == 1 else 'are'} longer than the "
        f"{' and the '.join(names)}, and {'is' if len(rows) == 1 else 'are'} truncated there, as the "
        "pipeline does"
        for rows, names in limits.items()
    ]
