"""The 8x8 digits that come with scikit-learn: 1,797 grey images, ten classes, no download."""

from __future__ import annotations

import torch

from distmatch.data.dataset import Dataset
from distmatch.data.scaling import Scaling


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
