"""Prompts and captions from files, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.data.images import read_image
from distmatch.data.prompts import captioned_images, read_prompts

PROMPTS = ["a red cat", "Zwei Hunde, schön", 'a "quoted" word']


def written(file: Path, prompts: list[str], column: str = "text") -> Path:
    """The prompts in a file of the form that its suffix says."""
    if file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps({"id": i, column: p}) for i, p in enumerate(prompts)) + "\n")
    elif file.suffix in (".csv", ".tsv"):
        with open(file, "w", newline="") as handle:
            rows = csv.writer(handle, delimiter="\t" if file.suffix == ".tsv" else ",")
            rows.writerows([["id", column], *([i, p] for i, p in enumerate(prompts))])
    else:
        file.write_text("\n".join(prompts) + "\n")
    return file


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.tsv"])
def test_every_form_holds_the_same_prompts(name, tmp_path):
    assert read_prompts(written(tmp_path / name, PROMPTS)) == PROMPTS


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_a_column_is_named_behind_a_colon(name, tmp_path):
    file = written(tmp_path / name, PROMPTS, "title")
    assert read_prompts(f"{file}:title") == PROMPTS
    with pytest.raises(UserError, match=r"no such column.*Got: columns id, title.*name the column"):
        read_prompts(file)
    with pytest.raises(UserError, match="no such column"):
        read_prompts(f"{file}:text")


def test_lines_of_json_may_be_texts(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    assert read_prompts(file) == PROMPTS


def test_lines_of_windows_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfa red cat\r\na dog\r\n\r\n")
    assert read_prompts(file) == ["a red cat", "a dog"]


BAD = {
    "p.txt": [
        (b"", "contains no prompts. Got: an empty file"),
        (b" \n\n", "contains no prompts. Got: nothing but blank lines"),
        (b"a\n\nb\n\nc\n", "2 of 5 prompts are blank.*line 2"),
        ("a cat\nein Bär".encode("latin1"), "not text in UTF-8.*0xe4 in line 2.*iconv"),
        ("a cat".encode("utf-16"), "not text in UTF-8"),
        (b"a\0b\n", "NUL"),
    ],
    "p.jsonl": [
        (b"", "has no rows"),
        (b'{"text": "a"}\n{"text"', "line 2, as JSON"),
        (b'{"text": "a"}\n\n{"text": "b"}', "line 2 is blank"),
        (b'{"text": "a"}\n{"text": 3}', "text is no text in 1 of 2 rows.*row 2"),
        (b'{"text": "a"}\n{}', "1 of 2 prompts are blank.*line 2"),
        (b"[1]\n", "line 1 is no object"),
        (b'{"text": "a", "prompt": "b"}', "unclear"),
    ],
    "p.csv": [
        (b"", "has no rows"),
        (b"id,text\n1,a\n2,b,c\n", "row 2 is not as long"),
        (b"id,text\n1,a\n2\n", "row 2 is not as long"),
        (b"id,text\n1,a\n2,\n", "1 of 2 prompts are blank.*row 2"),
    ],
}


@pytest.mark.parametrize(("name", "content", "said"), [(n, c, s) for n, rows in BAD.items() for c, s in rows])
def test_what_is_refused(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / name)


def test_other_things_than_files_of_prompts(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="has no columns"):
        read_prompts(f"{written(tmp_path / 'p.txt', PROMPTS)}:text")
    with pytest.raises(UserError, match="has no captions"):
        read_prompts(tmp_path)


def test_parquet_is_read_by_pyarrow(tmp_path, monkeypatch):
    file = tmp_path / "p.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs the package pyarrow"):
        read_prompts(file)

    class ParquetFile:
        """The two calls of pyarrow that are made: its schema, and the texts as rows."""

        def __init__(self, path: Path) -> None:
            assert path == file
            self.schema_arrow = [
                SimpleNamespace(name="n", type="int64"),
                SimpleNamespace(name="text", type="string"),
            ]

        def read(self, columns: list[str]) -> ParquetFile:
            assert columns == ["text"]
            return self

        def to_pylist(self) -> list[dict[str, str]]:
            return [{"text": prompt} for prompt in PROMPTS]

    package, module = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.parquet, module.ParquetFile = module, ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    assert read_prompts(file) == PROMPTS


def test_parquet_with_the_package_itself(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": PROMPTS, "n": [1, 2, 3]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == PROMPTS
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="as Parquet"):
        read_prompts(tmp_path / "p.parquet")


@pytest.fixture
def folder(tmp_path):
    """Three images of one size, their captions in another order than their names."""
    for i in range(3):
        Image.new("RGB", (6, 4), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in (2, 0, 1)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_folder_of_images_with_captions(folder):
    assert read_prompts(folder) == ["number 2", "number 0", "number 1"]
    data = load_data(folder)
    assert data.captions == ("number 0", "number 1", "number 2")  # beside their images
    assert data.raw[:, 0, 0, 0].tolist() == [0, 80, 160]
    assert data.subset(np_index([2, 0])).captions == ("number 2", "number 0")
    assert data.without_labels().captions == ()
    rows = [{"file_name": f"{i}.png", "title": f"title {i}"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(f"{folder}:title") == ["title 0", "title 1", "title 2"]
    assert load_data(folder).captions == ()  # no caption, as far as is known


def np_index(rows: list[int]):
    import torch

    return torch.tensor(rows)


def test_captions_are_content(folder):
    first = load_data(folder).content_hash
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("number 2", "number two"))
    assert load_data(folder).content_hash != first


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([0, 1], "1 of 3 images in .* have no caption.*Got: 2.png"),
        ([0, 1, 2, 3, 4], "2 of 5 images of .* do not exist.*3.png, 4.png"),
        ([0, 1, 2, 0], "two captions for one image.*0.png"),
        (["../0.png"], "outside its folder"),
        ([""], "line 1 has no file_name"),
    ],
)
def test_captions_that_do_not_fit_the_images(folder, rows, said):
    entries = [{"file_name": f"{i}.png" if isinstance(i, int) else i, "text": "a"} for i in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for read in (read_prompts, load_data):
        with pytest.raises(UserError, match=said):
            read(folder)


def test_blank_captions_are_missing_ones(folder):
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,\n2.png, \n")
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"2 of 3 images .* have no caption.*1.png, 2.png"):
        captioned_images(folder)


def test_images_are_cropped_around_their_center(tmp_path):
    """Stripes of 4 pixels: of 16x8 the middle 8x8 is left, which at half the size keeps its two stripes."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:8], pixels[:, 8:12], pixels[:, 12:] = 10, 60, 110, 160
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    assert (read_image(tmp_path / "stripes.png", (8, 8)).transpose(1, 2, 0) == pixels[:, 4:12]).all()
    small = read_image(tmp_path / "stripes.png", (4, 4))
    assert small.shape == (3, 4, 4)
    assert (small[..., 0] < 65).all()
    assert (small[..., 3] > 105).all()
