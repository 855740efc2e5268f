"""Options of pipelines with prompts, for every command that loads one. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from distmatch.base.errors import UserError
from distmatch.base.rules import Rule, Share, check_rules

CountOrDefault = Annotated[int | None, Rule("must be at least 1", lambda value: value is None or value >= 1)]


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """A pipeline of diffusers with prompts."""

    size: tuple[int, ...] | None = None
    """Height and width of its images in pixels, or one number for both; unset: the pipeline's default."""
    frames: CountOrDefault = None
    """Frames of its videos; unset: the pipeline's default."""
    max_tokens: CountOrDefault = None
    """Tokens of the longest prompt (max_sequence_length of its call); unset: the pipeline's default."""
    tokens: CountOrDefault = None
    """Number of tokens to which all prompts are padded, for pipelines that pad to the longest of a batch."""
    null_prompt: str | None = None
    """The prompt that stands for "no condition", such as a negative prompt; unset: the empty one."""

    def __post_init__(self) -> None:
        check_rules(self)
        if self.size is not None and (not 1 <= len(self.size) <= 2 or min(self.size) < 1):
            raise UserError(
                "--size is a height and a width in pixels, or one number for both",
                got=" ".join(map(str, self.size)),
                fix="for example --size 512 768",
            )

    def given(self) -> dict[str, Any]:
        """The arguments of :func:`distmatch.interop.pipelines.load_pipeline`; none for other teachers."""
        found = {
            "height": self.size[0] if self.size else None,
            "width": self.size[-1] if self.size else None,
            "num_frames": self.frames,
            "max_sequence_length": self.max_tokens,
            "tokens": self.tokens,
            "null": self.null_prompt,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """Encoding of prompts and of images with captions."""

    encode: Literal["cache", "live"] = "cache"
    """cache: once, before training, to a cache on disk; the text encoders are then freed. live: each batch
    during training."""
    cache: str = ""
    """Folder of the cache; empty: encodings in $DISTMATCH_CACHE, else in ~/.cache/distmatch."""
    prompt_dropout: Share = 0.0
    """Share of prompts replaced by the null prompt, new in each step."""

    def __post_init__(self) -> None:
        check_rules(self)
