"""The kinds of samples, distinguished by the number of axes of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["vector", "sequence", "image", "video"]

KINDS: tuple[Kind, ...] = ("vector", "sequence", "image", "video")
"""In the order of their axes: one sample is (D,), (L, D), (C, H, W) or (C, T, H, W)."""

ARRAYS: dict[Kind, str] = {
    "vector": "(N, D)",
    "sequence": "(N, L, D), or (N, L) of one number each",
    "image": "(N, H, W), (N, H, W, C) or (N, C, H, W)",
    "video": "(N, T, H, W, C) or (N, C, T, H, W), or (N, T, H, W) in grey",
}
"""The arrays that hold N of them; C is 1 or 3."""


def kind_of_array(x: np.ndarray) -> Kind:
    """The kind of exported samples (N, ...): pixels are bytes, with the channels of video last."""
    if x.dtype == np.uint8:
        return "video" if x.ndim == 5 else "image"
    return "sequence" if x.ndim == 3 else "vector"


def kind_of_shape(shape: Sequence[int]) -> Kind:
    """The kind of samples of this shape, which has 1 to 4 axes."""
    return KINDS[len(shape) - 1]
