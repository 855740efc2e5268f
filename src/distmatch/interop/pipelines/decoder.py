"""The autoencoder of a pipeline as the decoder of its teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distmatch.interop.pipelines.pipeline import Pipeline


class PipelineDecoder:
    """The decoder of a teacher made of a pipeline; see :class:`distmatch.interop.Decoder`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.shape = pipeline, pipeline.shape

    def decode(self, z: Tensor) -> Tensor:
        """Samples of the denoiser as images or video, without gradients."""
        return self.pipeline.decode(z)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images or video in [-1, 1] as samples of the denoiser, by the pipeline's autoencoder.

        Raises:
            UserError: The pipeline does more with its latents than to scale and permute them.
        """
        return self.pipeline.tail.encode(x, noise)

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of what its encodings depend on besides the image."""
        return self.pipeline.tail.fingerprint

    def __eq__(self, other: object) -> bool:
        """Whether it is the decoder of the same pipeline."""
        return isinstance(other, PipelineDecoder) and self.pipeline is other.pipeline

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineDecoder:
        """Itself: nothing in it ever changes."""
        return self
