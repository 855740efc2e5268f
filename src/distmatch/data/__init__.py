"""Data: digits, arrays, image folders and toy mixtures, and the order in which batches visit them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from distmatch.base.errors import UserError, unknown_name
from distmatch.data.arrays import from_arrays
from distmatch.data.captions import captioned_digits
from distmatch.data.columns import Column
from distmatch.data.dataset import Dataset
from distmatch.data.digits import digits, moving_digits, stacked_digits
from distmatch.data.encoded import cifar10, fashion_mnist
from distmatch.data.files import load_file
from distmatch.data.order import BatchOrder
from distmatch.data.scaling import Scaling
from distmatch.data.tails import long_tailed
from distmatch.data.toys import TOY_NAMES, toy, toy_dataset

_NAMED: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "digits:long-tail": lambda: long_tailed(digits()),
    "moving-digits": moving_digits,
    "stacked-digits": stacked_digits,
    "captioned-digits": captioned_digits,
    "captioned-digits:test": lambda: captioned_digits(split="test"),
    "captioned-digits:three": lambda: captioned_digits("three"),
    "captioned-digits:three:test": lambda: captioned_digits("three", "test"),
    "captioned-digits:relations": lambda: captioned_digits("relations"),
    "captioned-digits:relations:test": lambda: captioned_digits("relations", "test"),
    "fashion_mnist": fashion_mnist,
    "fashion_mnist:test": lambda: fashion_mnist("test"),
    "fashion_mnist:long-tail": lambda: long_tailed(fashion_mnist()),
    "cifar10": cifar10,
    "cifar10:test": lambda: cifar10("test"),
}
DATA_NAMES = (*_NAMED, *TOY_NAMES)

__all__ = [
    "DATA_NAMES",
    "TOY_NAMES",
    "BatchOrder",
    "Dataset",
    "Scaling",
    "from_arrays",
    "load_data",
    "toy",
    "toy_dataset",
]


def load_data(
    spec: str | os.PathLike[str], *, labels: bool = True, columns: Sequence[Column] = ()
) -> Dataset:
    """Loads data by name or from a path.

    Args:
        spec: One of :data:`DATA_NAMES`, an ``.npz``, ``.npy`` or ``.csv`` file, or a folder of images. A name
            goes before a file that is called the same; ``./digits`` means the file.
        labels: Whether to keep labels where there are any; without, those of a file are not even looked at.
        columns: Of other data: a table must have the same, and is read in their order with their words.

    Raises:
        UserError: There is neither such a name nor such a file, or the file cannot be used.
    """
    text = os.fspath(spec)
    if isinstance(spec, str) and text in DATA_NAMES:
        data = toy_dataset(text) if text in TOY_NAMES else _NAMED[text]()
        return data if labels else data.without_labels()
    if not text:
        raise UserError("no data were named", expected=f"a path, or one of {', '.join(DATA_NAMES)}")
    looks_like_path = not isinstance(spec, str) or os.sep in text or "." in text or ":one-hot" in text
    if not looks_like_path and not Path(text).exists():
        raise unknown_name("data name (and there is no file or folder called that)", text, DATA_NAMES)
    return load_file(text, labels=labels, columns=columns)
