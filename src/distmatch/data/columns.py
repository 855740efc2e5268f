"""The columns of a table: the meaning of a vector's elements, and their conversion to text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LABEL = "label"
"""Name of the column that holds the class."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: Its name in the header.
        values: Of a column of text that is encoded one-hot, the words, one element of the vector for each;
            () for a column of numbers, which is one element.
        whole: Whether all its numbers were whole. A part of a table may be so by chance: columns are equal
            without it.
    """

    name: str
    values: tuple[str, ...] = ()
    whole: bool = field(default=False, compare=False)

    @property
    def width(self) -> int:
        """Elements that it takes in a vector."""
        return len(self.values) or 1

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"name": self.name, "values": list(self.values), **({"whole": True} if self.whole else {})}


def columns_of(about: Mapping[str, Any], width: int | None = None) -> tuple[Column, ...]:
    """The columns that a saved model describes.

    Args:
        about: What the model keeps of its data.
        width: Elements of its vectors; where the description does not fit, there are plain numbered columns.
            None takes the description as it is, () without one.
    """
    try:
        found = tuple(
            Column(str(c["name"]), tuple(map(str, c["values"])), c.get("whole") is True)
            for c in about["columns"]
        )
    except (KeyError, TypeError, AttributeError):
        found = ()
    if width is None or sum(column.width for column in found) == width:
        return found
    return tuple(Column(f"column {k + 1}") for k in range(width))


def element_names(columns: Sequence[Column]) -> list[str | None]:
    """For each element of a vector the name of its column of numbers; None for a part of a word."""
    return [name for c in columns for name in ([None] * len(c.values) if c.values else [c.name])]


def is_coded(columns: Sequence[Column]) -> bool:
    """Whether a table contains words or whole numbers, between which a model's values may be."""
    return any(column.values or column.whole for column in columns)


def decoded(columns: Sequence[Column], x: np.ndarray) -> np.ndarray:
    """Vectors (N, D) as the rows of a table: whole numbers are rounded, of a word the largest element is 1.

    Args:
        columns: The columns, whose widths add up to D; () changes nothing.
        x: Vectors in the units of the data.

    Returns:
        (N, D), of the type of ``x``.
    """
    if not is_coded(columns):
        return x
    rows, begin = x.copy(), 0
    for column in columns:
        part = rows[:, begin : begin + column.width]
        if column.values:
            part[:] = part.argmax(1)[:, None] == np.arange(column.width)
        elif column.whole:
            np.rint(part, out=part)
        begin += column.width
    return rows


def table_text(
    columns: Sequence[Column], x: np.ndarray, labels: np.ndarray | None = None, names: Sequence[str] = ()
) -> str:
    """A table as CSV, with a header; numbers in the fewest digits that give them back, whole ones rounded.

    Args:
        columns: The columns, whose widths add up to D.
        x: Vectors (N, D), in the units of the data. Of words encoded one-hot the largest element counts.
        labels: Classes (N,), -1 for none, or None; they become the last column, :data:`LABEL`.
        names: Names of the classes.
    """
    cells: list[list[str]] = []
    begin = 0
    for column in columns:
        part = x[:, begin : begin + column.width]
        begin += column.width
        if column.values:
            cells.append([column.values[k] for k in part.argmax(1)])
        elif column.whole:
            cells.append([f"{v:.0f}" for v in np.rint(part[:, 0]) + 0.0])  # + 0.0: no -0
        else:
            cells.append([str(v) for v in part[:, 0]])
    header = [column.name for column in columns]
    if labels is not None:
        header.append(LABEL)
        cells.append([names[k] if 0 <= k < len(names) else str(k) for k in labels.tolist()])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*cells, strict=True))
    return text.getvalue()
