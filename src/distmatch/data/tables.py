"""Tables from CSV files: columns of numbers, words if requested, and one column of classes."""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distmatch.base.errors import UserError
from distmatch.base.stack import caller_level
from distmatch.data.arrays import from_arrays
from distmatch.data.bounds import check_bytes
from distmatch.data.classes import in_order, listed
from distmatch.data.columns import LABEL, Column
from distmatch.data.dataset import Dataset

ONE_HOT = "one-hot"
"""The option after the file's name that encodes columns of text."""
_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}
_MOST_VALUES = 100  # words of a column; more are names or remarks
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_MOST_CLASSES = 1000
_SWELL = 20  # times its size in the file that the text of a table takes while it is read


def load_table(
    file: Path, *, one_hot: bool = False, labels: bool = True, like: Sequence[Column] = ()
) -> Dataset:
    """Reads a table: every row is a vector.

    The first line names the columns; where it holds numbers alone, it is a row. Cells are separated by
    commas, semicolons or tabs, whichever the first line has most of. The column ``label`` is the class.

    Args:
        file: The file, UTF-8.
        one_hot: Whether columns of text become one element for each of their words.
        labels: Whether to keep the classes.
        like: Columns of another table, which this one must have; in their order and with their words.

    Raises:
        UserError: A column of text that is not to be encoded, a missing value, rows of different lengths, or
            a damaged file. The message names column and line.
    """
    header, rows = _read(file)
    cells = dict(zip(header, zip(*rows, strict=True), strict=True))
    label = next((name for name in header if name.lower() == LABEL), None)
    classes = cells.pop(label) if label is not None else None
    if not cells:
        raise UserError(f"{file} has no column besides {label}", expected="columns of numbers")
    for name, column in cells.items():
        _refuse_missing(file, name, column)
    _warn_of_index(file, rows, header[0])
    columns = _like(file, cells, like) if like else [_column(file, n, c, one_hot) for n, c in cells.items()]
    x = np.concatenate([_elements(file, c, cells[c.name]) for c in columns], 1)
    found: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    if labels and classes is not None:
        _refuse_missing(file, LABEL, classes)
        found, class_names = _classes(file, classes)
    return from_arrays(x, found, class_names=class_names, name=str(file), columns=tuple(columns))


def _read(file: Path) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the rows."""
    check_bytes(file, _SWELL * file.stat().st_size)
    try:
        with open(file, encoding="utf-8-sig", newline="") as handle:
            head = handle.readline()
            handle.seek(0)
            separator = max(",;\t", key=head.count)
            rows = [[cell.strip() for cell in row] for row in csv.reader(handle, delimiter=separator) if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(
            f"cannot read {file} as a table",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            expected="text in UTF-8, cells separated by commas",
            fix="save it as CSV again",
        ) from error
    if not rows:
        raise UserError(f"{file} is empty", expected="a line of names and rows of numbers")
    header = rows[0]
    if all(_number(cell) is not None for cell in header):
        header = [_unnamed(k) for k in range(len(header))]
    else:
        rows = rows[1:]
    names = [name or _unnamed(k) for k, name in enumerate(header)]
    double = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if double is not None:
        raise UserError(f"{file} has two columns of one name", got=double[:80], fix="rename one of them")
    for k, row in enumerate(rows):
        if len(row) != len(names):
            raise UserError(
                f"{file}: row {k + 1} is not as long as the first line",
                got=f"{len(row)} cells",
                expected=f"{len(names)}: {listed(names)}",
                fix="put cells with commas in quotes",
            )
    if not rows:
        raise UserError(f"{file} has no rows", got=f"a line of names: {listed(names)}")
    return names, rows


def _warn_of_index(file: Path, rows: list[list[str]], first: str) -> None:
    """Warns of the index that pandas writes: a column without a name that counts the rows."""
    if (
        first in (_unnamed(0), "Unnamed: 0")
        and len(rows) > 2
        and all(row[0] == str(k) for k, row in enumerate(rows))
    ):
        warnings.warn(
            f"{file}: the first column has no name and counts 0, 1, 2, ...: is it an index? It is learned as "
            "if it were data. Write the table without it: to_csv(..., index=False)",
            stacklevel=caller_level(),
        )


def _unnamed(k: int) -> str:
    return f"column {k + 1}"


def _number(cell: str) -> float | None:
    """The number in a cell, or None; Python's own underscores and other digits are no numbers here."""
    try:
        return float(cell) if cell.isascii() and "_" not in cell else None
    except ValueError:
        return None


def _refuse_missing(file: Path, name: str, cells: Sequence[str]) -> None:
    missing = [k for k, cell in enumerate(cells) if cell.lower() in _MISSING]
    if missing:
        raise UserError(
            f"{file}: values are missing in the column {name}",
            got=f"{len(missing)} of {len(cells)}, the first ({cells[missing[0]]!r}) in row {missing[0] + 1}",
            expected="a value in every cell",
            fix="impute them, or remove these rows or the column; distmatch does not impute",
        )


def _column(file: Path, name: str, cells: Sequence[str], one_hot: bool) -> Column:
    """What a column holds.

    Raises:
        UserError: Text that is not to be, or cannot be encoded.
    """
    numbers = [_number(cell) for cell in cells]
    text = [k for k, number in enumerate(numbers) if number is None]
    if not text:
        return Column(name, whole=all(n is not None and n.is_integer() for n in numbers))
    commas = [k for k in text if _DECIMAL_COMMA.fullmatch(cells[k])]
    if len(commas) == len(text):
        raise UserError(
            f"{file}: the column {name} contains numbers with decimal commas",
            got=f"{cells[text[0]][:40]!r} in row {text[0] + 1}, {len(commas)} such cells of {len(cells)}",
            expected="decimal points, as in 3.5",
            fix="convert it with pd.read_csv(file, sep=';', decimal=',').to_csv(new, index=False)",
        )
    words = in_order(sorted(set(cells)))
    got = f"{cells[text[0]][:40]!r} in row {text[0] + 1}, {len(text)} such cells of {len(cells)}"
    if len(text) < len(cells) / 2:
        raise UserError(
            f"{file}: the column {name} contains numbers and text",
            got=got,
            fix="correct or remove these rows",
        )
    if not one_hot:
        raise UserError(
            f"{file}: the column {name} contains text",
            got=f"{got}, {len(words)} different words",
            expected="numbers",
            fix=f"remove the column, name it {LABEL!r} if it is the class, or encode all such columns: "
            f"{file}:{ONE_HOT}",
        )
    if len(words) > _MOST_VALUES:
        raise UserError(
            f"{file}: the column {name} has too many different words to be encoded",
            got=f"{len(words)}",
            expected=f"at most {_MOST_VALUES}",
            fix="remove the column, or merge rare words",
        )
    return Column(name, tuple(words))


def _like(file: Path, cells: dict[str, tuple[str, ...]], like: Sequence[Column]) -> list[Column]:
    """The columns of another table, once it is known that this one has the same."""
    names = [column.name for column in like]
    if sorted(names) != sorted(cells):
        raise UserError(
            f"{file} has other columns than the data that it is compared with",
            got=listed(list(cells)),
            expected=listed(names),
            fix="name the columns alike",
        )
    return list(like)


def _elements(file: Path, column: Column, cells: Sequence[str]) -> np.ndarray:
    """The elements (N, width) of a column, float64."""
    if not column.values:
        numbers = [_number(cell) for cell in cells]
        for k, number in enumerate(numbers):
            if number is None or not math.isfinite(number):
                raise UserError(
                    f"{file}: the column {column.name} contains a value that is not a finite number",
                    got=f"{cells[k][:40]!r} in row {k + 1}",
                    expected="numbers",
                )
        return np.array(numbers, dtype=np.float64)[:, None]
    places = {word: k for k, word in enumerate(column.values)}
    unknown = next((cell for cell in cells if cell not in places), None)
    if unknown is not None:
        raise UserError(
            f"{file}: the column {column.name} contains a word that the other data do not have",
            got=repr(unknown[:40]),
            expected=listed(column.values),
        )
    return np.eye(len(places))[[places[cell] for cell in cells]]


def _classes(file: Path, cells: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes (N,) and their names, from the column of classes."""
    numbers = [_number(cell) for cell in cells]
    if all(n is not None and math.isfinite(n) for n in numbers):
        broken = next((c for c, n in zip(cells, numbers, strict=True) if n is not None and n != int(n)), None)
        if broken is not None:
            raise UserError(
                f"{file}: the column {LABEL} is the class and contains a value that is not a whole number",
                got=broken[:40],
                fix="rename the column if it is a quantity",
            )
        cells = [str(int(n)) for n in numbers if n is not None]
    names = in_order(sorted(set(cells)))
    if len(names) > _MOST_CLASSES:
        raise UserError(
            f"{file}: too many classes in the column {LABEL}",
            got=len(names),
            expected=f"at most {_MOST_CLASSES}",
        )
    places = {name: k for k, name in enumerate(names)}
    return np.array([places[cell] for cell in cells]), tuple(names)
