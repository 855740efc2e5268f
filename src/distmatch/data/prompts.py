"""Prompts and captions from files: text, JSON lines, CSV, Parquet, and image folders with metadata."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from distmatch.base.errors import UserError, cause
from distmatch.base.inputs import checked_path, memory_bound, parse_json, read_limited, require_regular_file
from distmatch.data.images import images_below

METADATA = ("metadata.jsonl", "metadata.csv")
"""Files that hold the captions of a folder of images, with the images' names in ``file_name``."""
COLUMNS = ("text", "prompt", "caption")
"""What a column of captions is usually called."""
_SHOWN = 3  # names in a message
_SWELL = 20  # times its size in the file that text takes while it is read


def read_prompts(source: str | os.PathLike[str]) -> list[str]:
    """The prompts in a file, in its order.

    Args:
        source: A text file with a prompt in each line; ``.jsonl`` with a text or an object in each line;
            ``.csv``, ``.tsv`` or ``.parquet`` with named columns; or a folder of images with a
            ``metadata.jsonl`` or ``metadata.csv``, as Hugging Face's imagefolder has it. A column other than
            ``text``, ``prompt`` or ``caption`` is named behind a colon: ``captions.csv:title``.

    Raises:
        UserError: There is no such file or column, an empty line, or what is no text in UTF-8.
    """
    path, column = prompts_path(source)
    if path.is_dir():
        return [caption for _, caption in captioned_images(path, column)]
    require_regular_file(path, "a file of prompts")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
        found = list(_column(path, list(_records(path)), column))
    elif column:
        raise UserError(
            f"{path} is read as text, a prompt in each line, and has no columns",
            got=f"the column {column}",
            expected=".jsonl, .csv, .tsv or .parquet with a named column",
        )
    else:
        found = _text(path).rstrip().split("\n")
    _refuse_blank(path, found)
    return found


def prompts_path(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """The file or folder that is named, and the column behind its colon; '' without one.

    Raises:
        UserError: There is no such file.
    """
    text = os.path.expanduser(os.fspath(source))
    head, _, column = text.rpartition(":")
    for name, found in ((text, ""), (head, column)):
        if name and checked_path(name).exists():
            return Path(name), found
    raise UserError(
        f"{text} does not exist",
        got=f"no such file or folder, relative to {Path.cwd()}",
        expected="a text file with a prompt in each line, .jsonl, .csv, .parquet, or a folder of images with "
        "metadata.jsonl",
        fix="check the path; a prompt itself is given with --prompt where a command has it",
    )


def has_captions(folder: Path) -> bool:
    """Whether a folder of images has a file of metadata with a column of captions."""
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    first: Mapping[str, Any] = next(iter(_records(file)), {}) if file is not None else {}
    return any(name in first for name in COLUMNS)


def captioned_images(folder: Path, column: str = "") -> list[tuple[Path, str]]:
    """The images of a folder with their captions, in the order of its metadata.

    Args:
        folder: A folder with ``metadata.jsonl`` or ``metadata.csv``.
        column: The column of captions; '' takes ``text``, ``prompt`` or ``caption``.

    Raises:
        UserError: There is no such file, an image in it is missing, or an image has no caption.
    """
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder} has no captions",
            expected=f"{' or '.join(METADATA)} with file_name and a column of text for each image",
            fix="write it, or pass a file of prompts",
        )
    records = list(_records(file))
    names = [str(record.get("file_name", "")) for record in records]
    if not all(names):
        raise UserError(f"{file}: line {names.index('') + 1} has no file_name", fix="add it")
    if outside := next((n for n in names if n.startswith("/") or ".." in PurePosixPath(n).parts), None):
        raise UserError(f"{file} names a file outside its folder", got=outside[:200])
    if len(set(names)) < len(names):
        double = Counter(names).most_common(1)[0][0]
        raise UserError(f"{file} has two captions for one image", got=double[:200], fix="remove one")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{len(missing)} of {len(names)} images of {file} do not exist",
            got=_some(missing),
            fix="copy them, or remove their lines",
        )
    captions = list(_column(file, records, column))
    without = [name for name, text in zip(names, captions, strict=True) if not text.strip()]
    known = {(folder / name).resolve() for name in names}
    images = images_below(folder)
    without += [str(image.relative_to(folder)) for image in images if image.resolve() not in known]
    if without:
        raise UserError(
            f"{len(without)} of {len(known.union(image.resolve() for image in images))} images in {folder} "
            "have no caption",
            got=_some(without),
            expected=f"a line in {file.name} for each image",
            fix="add their captions, or move the images elsewhere",
        )
    return [(folder / name, caption) for name, caption in zip(names, captions, strict=True)]


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file with columns; a text alone in a line of JSON is the column ``text``."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        text = _text(file).rstrip()
        for number, line in enumerate(text.split("\n") if text else (), 1):
            if not line.strip():
                raise UserError(f"{file}: line {number} is blank", fix="remove it")
            value = parse_json(line, f"{file}, line {number},")
            value = {"text": value} if isinstance(value, str) else value
            if not isinstance(value, dict):
                raise UserError(
                    f"{file}: line {number} is no object", got=line[:80], expected='{"text": "a red cat"}'
                )
            yield value
    elif suffix == ".parquet":
        yield from _parquet(file)
    else:
        rows = csv.DictReader(io.StringIO(_text(file)), delimiter="\t" if suffix == ".tsv" else ",")
        try:
            for number, row in enumerate(rows, 1):
                if None in row or None in row.values():
                    header = rows.fieldnames or ()
                    raise UserError(
                        f"{file}: row {number} is not as long as the first line",
                        expected=f"{len(header)} cells: {', '.join(header)[:200]}",
                        fix="put texts with commas in quotes",
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"cannot read {file} as a table", got=str(error)[:200]) from error


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"{file} is a Parquet file, and reading it needs the package pyarrow, which is not installed",
            got=str(error),
            fix="pip install distmatch[arrow], or write the captions as .csv or .jsonl",
        ) from error
    try:
        table = parquet.ParquetFile(file)
        texts = [f.name for f in table.schema_arrow if str(f.type) in ("string", "large_string")]
        yield from table.read(columns=texts).to_pylist()
    except (OSError, ValueError) as error:  # errors of Arrow are such
        raise UserError(f"cannot read {file} as Parquet", got=cause(error), fix="write it again") from error


def _column(file: Path, records: Sequence[Mapping[str, Any]], column: str) -> Iterator[str]:
    """The texts of one column."""
    if not records:
        raise UserError(f"{file} has no rows", expected="a prompt in each of them")
    names = list(dict.fromkeys(name for record in records for name in record))
    usual = [name for name in COLUMNS if name in names]
    if column not in names if column else len(usual) != 1:
        raise UserError(
            f"{file}: the column of prompts is unclear" if len(usual) > 1 else f"{file} has no such column",
            got=f"columns {', '.join(names)[:200]}",
            expected=column or f"one of {', '.join(COLUMNS)}",
            fix=f"name the column: {file}:{(usual or names or ['text'])[0]}",
        )
    name = column or usual[0]
    wrong = [k for k, record in enumerate(records, 1) if not isinstance(record.get(name, ""), str)]
    if wrong:
        raise UserError(
            f"{file}: {name} is no text in {len(wrong)} of {len(records)} rows",
            got=f"{records[wrong[0] - 1][name]!r:.80} in row {wrong[0]}",
        )
    for record in records:
        yield record.get(name, "")


def _text(file: Path) -> str:
    content = read_limited(file, memory_bound() // _SWELL, "a text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file} is not text in UTF-8",
            got=f"byte {content[error.start]:#04x} in line {line}",
            fix=f"convert it, for example: iconv -f latin1 -t utf-8 {file.name}",
        ) from error
    if "\0" in text:
        raise UserError(f"{file} is not text", got="a NUL in it", expected="text in UTF-8")
    return text.replace("\r\n", "\n")


def _refuse_blank(file: Path, prompts: Sequence[str]) -> None:
    """Refuses a file without prompts, and blank ones among others."""
    blank = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if len(blank) == len(prompts):
        raise UserError(
            f"{file} contains no prompts",
            got="nothing but blank lines" if file.stat().st_size else "an empty file",
            expected="a prompt in each line",
            fix="write at least one: a red cat",
        )
    if blank:
        raise UserError(
            f"{file}: {len(blank)} of {len(prompts)} prompts are blank",
            got=f"the first in {'line' if file.suffix.lower() not in ('.csv', '.tsv') else 'row'} {blank[0]}",
            fix="remove them; --prompt-dropout trains without a prompt",
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(name[:100] for name in names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
