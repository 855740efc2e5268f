"""The text encoders of a pipeline: freed when all prompts are encoded, loaded again when one is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.interop.diffusers_parts import is_text_part
from distmatch.interop.pipelines.containers import replaced

_ENCODE = "encode_prompt"  # what pipelines of diffusers call their method


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
