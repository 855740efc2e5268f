"""The 8x8 digits that come with scikit-learn, as images and as clips in which they move; no download."""

from __future__ import annotations

import torch

from distmatch.data.dataset import Dataset
from distmatch.data.scaling import Scaling

_DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # rows, columns a frame
_FRAMES = 8  # as many as rows and columns: the frame after the last would be the first again


def digits() -> Dataset:
    """The scikit-learn digits as images (1, 8, 8), raw values 0..16."""
    from sklearn.datasets import load_digits  # here, because importing distmatch must stay quick

    bunch = load_digits()
    return Dataset(
        raw=torch.from_numpy(bunch.images).to(torch.uint8)[:, None],
        labels=torch.from_numpy(bunch.target).to(torch.int64),
        class_names=tuple(str(k) for k in range(10)),
        name="digits",
        scaling=Scaling.for_images(0, 16, "digits, 0..16"),
    )


def moving_digits() -> Dataset:
    """Every digit moving by one pixel a frame in four directions: video (1, 8, 8, 8) of 8 frames.

    What leaves on one side comes in on the other. The 40 classes are digit and direction, ``"3 left"``; clip
    ``4 k + d`` is sample k of the digits in direction d. Axes are channels, frames, rows, columns.
    """
    still = digits()
    ways = [
        torch.stack([still.raw.roll((row * t, column * t), (-2, -1)) for t in range(_FRAMES)], dim=2)
        for row, column in _DIRECTIONS.values()
    ]
    digit = torch.zeros(0, dtype=torch.int64) if still.labels is None else still.labels
    return Dataset(
        raw=torch.stack(ways, dim=1).flatten(0, 1),
        labels=(len(ways) * digit[:, None] + torch.arange(len(ways))).flatten(),
        class_names=tuple(f"{name} {way}" for name in still.class_names for way in _DIRECTIONS),
        name="moving-digits",
        scaling=still.scaling,
    )
