"""The 8x8 digits that come with scikit-learn: still, moving, and three to an image; no download."""

from __future__ import annotations

import torch

from distmatch.base.seeds import generator
from distmatch.data.dataset import Dataset
from distmatch.data.scaling import Scaling

_DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # rows, columns a frame
_STACKS = 20_000
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
    """Every digit moving by one pixel a frame: 1,797 clips (1, 8, 8, 8) of channel, frames, rows, columns.

    What leaves on one side comes in on the other. Each digit moves in one direction, drawn with a fixed seed:
    several clips of one digit would not be independent. The 40 classes are digit and direction: class 4 k + d
    is digit k moving right, left, down or up.
    """
    still = digits()
    digit = torch.zeros(0, dtype=torch.int64) if still.labels is None else still.labels
    way = torch.randint(len(_DIRECTIONS), (len(still),), generator=generator(0, "moving-digits"))
    clips = torch.empty(len(still), 1, _FRAMES, *still.shape[1:], dtype=still.raw.dtype)
    for d, (row, column) in enumerate(_DIRECTIONS.values()):
        of_this = way == d
        for t in range(_FRAMES):
            clips[of_this, :, t] = still.raw[of_this].roll((row * t, column * t), (-2, -1))
    return Dataset(
        raw=clips,
        labels=len(_DIRECTIONS) * digit + way,
        class_names=tuple(f"{name} {word}" for name in still.class_names for word in _DIRECTIONS),
        name="moving-digits",
        scaling=still.scaling,
    )


def stacked_digits() -> Dataset:
    """Three digits in the channels of one image: 20,000 images (3, 8, 8) of 1,000 modes, without labels.

    The classic count of modes (stacked MNIST; Metz et al. 2017, arXiv 1611.02163) at the size of a laptop.
    The digits of the channels are drawn with replacement, with a fixed seed: a classifier of single digits
    says which of the modes a sample is of.
    """
    single = digits()
    rows = torch.randint(len(single), (_STACKS, 3), generator=generator(0, "stacked-digits"))
    return Dataset(
        raw=single.raw[rows, 0],
        labels=None,
        class_names=(),
        name="stacked-digits",
        scaling=Scaling.for_images(0, 16, "stacked digits, 0..16"),
    )
