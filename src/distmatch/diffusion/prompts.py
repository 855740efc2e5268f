"""What a model makes of prompts: the encoder that a text-conditioned denoiser carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.latents import OfSamples


@runtime_checkable
class PromptEncoder(Protocol):
    """The attribute ``denoiser.prompt_encoder`` of a denoiser that is conditioned on text.

    Copies of a denoiser share it; it is no part of their parameters.
    """

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of all that encodings depend on besides the prompt: equal means equal rows."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The fields that the denoiser takes, one row for each prompt."""
        ...


def prompt_encoder_of(model: OfSamples) -> PromptEncoder | None:
    """The prompt encoder of a denoiser, found through wrappers, or of a student; None where there is none."""
    inner: Any = model
    while inner is not None:
        found: PromptEncoder | None = getattr(inner, "prompt_encoder", None)
        if found is not None:
            return found
        inner = getattr(inner, "inner", getattr(inner, "denoiser", None))
    return None


def encode_prompts(model: OfSamples, prompts: Sequence[str]) -> Conditioning:
    """Prompts as the conditioning of a model, one row each.

    Args:
        model: A denoiser, a wrapper around one, or a student.
        prompts: The texts.

    Raises:
        UserError: The model takes no prompts, or there are none.
    """
    encoder = prompt_encoder_of(model)
    if encoder is None:
        raise UserError(
            "this model takes no prompts",
            got=f"{len(prompts)} prompts",
            expected="a pipeline with prompts, or a model that was trained on captions",
            fix="pass its conditioning instead",
        )
    if isinstance(prompts, str) or not len(prompts):
        raise UserError("prompts are given as a list of one or more", got=repr(prompts)[:80])
    return encoder.encode(prompts)
