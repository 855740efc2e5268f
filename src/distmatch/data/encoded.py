"""Fashion-MNIST and CIFAR-10, from the archives in the folder that DISTMATCH_DATA names.

``fashion_mnist.npz`` holds ``x_train``, ``y_train``, ``x_test``, ``y_test`` and ``class_names`` as they are.

``cifar10_train_part1.npz``, ``cifar10_train_part2.npz`` and ``cifar10_test.npz`` hold ``labels``,
``class_names`` and ``residual``, uint8 (3, N, 32, 32): the channels red - green, green and blue - green, each
replaced by its difference from the row above and then from the column to the left, all modulo 256. That is
reversible, and compresses better than pixels do.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from distmatch.base.errors import UserError
from distmatch.data.arrays import from_arrays
from distmatch.data.dataset import Dataset
from distmatch.data.files import Archive

DATA_VARIABLE = "DISTMATCH_DATA"
_CIFAR_FILES = {
    "train": ("cifar10_train_part1.npz", "cifar10_train_part2.npz"),
    "test": ("cifar10_test.npz",),
}


def _archive(file: str) -> Archive:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise UserError(
            f"{file} is needed, and {DATA_VARIABLE} is not set",
            expected=f"the environment variable {DATA_VARIABLE} with the folder that contains it",
            fix=f"export {DATA_VARIABLE}=/path/to/folder, or use --data digits, which needs no file",
        )
    path = Path(folder, file)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist",
            got=f"{DATA_VARIABLE}={folder}",
            expected=f"a folder that contains {file}",
            fix=f"copy {file} there, or set {DATA_VARIABLE} to the folder that has it",
        )
    return Archive(path)


def _take(archive: Archive, key: str, file: str) -> np.ndarray:
    if key not in archive:
        raise UserError(
            f"{file} is not the expected archive",
            got=f"arrays {', '.join(archive)}",
            expected=f"one called {key}",
        )
    return archive[key]


def fashion_mnist(split: str = "train") -> Dataset:
    """Fashion-MNIST, images (1, 28, 28), 60,000 in ``"train"`` and 10,000 in ``"test"``.

    Raises:
        UserError: The archive is not there, or is not what it should be.
    """
    file = "fashion_mnist.npz"
    archive = _archive(file)
    x, y, names = (_take(archive, key, file) for key in (f"x_{split}", f"y_{split}", "class_names"))
    return from_arrays(x, y, class_names=names.tolist(), name=f"fashion_mnist:{split}")


def cifar10(split: str = "train") -> Dataset:
    """CIFAR-10, color images (3, 32, 32), 50,000 in ``"train"`` and 10,000 in ``"test"``.

    Raises:
        UserError: The archives are not there, or are not what they should be.
    """
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    names: list[str] = []
    for file in _CIFAR_FILES[split]:
        archive = _archive(file)
        residual, y, known = (_take(archive, key, file) for key in ("residual", "labels", "class_names"))
        if residual.ndim != 4 or residual.shape[0] != 3 or residual.dtype != np.uint8:
            raise UserError(
                f"{file} is not the expected archive",
                got=f"residual {residual.dtype} {residual.shape}",
                expected="uint8 (3, N, 32, 32)",
            )
        pixels.append(decode_residual(residual))
        labels.append(y)
        names = known.tolist()
    x, y = np.concatenate(pixels), np.concatenate(labels)
    return from_arrays(x, y, class_names=names, name=f"cifar10:{split}")


def decode_residual(residual: np.ndarray) -> np.ndarray:
    """Turns ``residual`` (3, N, H, W), uint8 as above, into pixels (N, 3, H, W), uint8, RGB."""
    planes = residual.copy()
    # Running sums undo the differences; uint8 wraps around, which is the modulo 256 that is wanted.
    np.cumsum(planes, axis=-2, dtype=np.uint8, out=planes)
    np.cumsum(planes, axis=-1, dtype=np.uint8, out=planes)
    green = planes[1]
    return np.stack((planes[0] + green, green, planes[2] + green), axis=1)
