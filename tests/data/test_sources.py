"""Tars and tables of Arrow: what other programs wrote is read as they mean it, and damage is named."""

import contextlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.data.store import blocks
from distmatch.data.store.prepare import prepare

PIXELS = np.random.default_rng(0).integers(0, 256, (70, 6, 5, 3), dtype=np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[i]).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def assert_holds(store, rows=range(70), captions=None, names=None, labels=None):
    data = load_data(store)
    np.testing.assert_array_equal(data.raw.movedim(1, -1).numpy(), PIXELS[list(rows)])
    assert list(data.captions) == ([captions(i) for i in rows] if captions else [])
    assert data.class_names == (names or ())
    assert labels is None or data.labels.tolist() == [labels(i) for i in rows]
    return data


@pytest.mark.parametrize("kind", ["txt", "json", "both"])
def test_tars(tmp_path, kind):
    """Two shards with captions as text and as JSON; classes by name are numbered in order."""
    words = ("dog", "ant", "cat")
    for shard, rows in enumerate((range(40), range(40, 70))):
        members = [("notes/", b"")] if shard else []
        for i in rows:
            own = [(f"notes/{i:03d}.png", png(i)), (f"notes/{i:03d}.cls", words[i % 3].encode())]
            if kind != "json":
                own.append((f"notes/{i:03d}.txt", f"ä {i}\n".encode()))
            if kind != "txt":
                about = {"width": 5} if kind == "both" else {"caption": f"ä {i}", "n": [1]}
                own.append((f"notes/{i:03d}.json", json.dumps(about).encode()))
            members += own
        write_tar(tmp_path / f"{shard}.tar", [m for m in members if m[0] != "notes/"])
    index = prepare(tmp_path, tmp_path / "store", workers=3)
    order = (2, 0, 1)
    names = ("ant", "cat", "dog")
    assert_holds(tmp_path / "store", captions=lambda i: f"ä {i}", names=names, labels=lambda i: order[i % 3])
    assert index["class_names"] == list(names)
    prepare(tmp_path / "1.tar", tmp_path / "one", labels=False)
    assert_holds(tmp_path / "one", range(40, 70), captions=lambda i: f"ä {i}")


def test_numbers_are_classes_and_fields_are_chosen(tmp_path):
    members = []
    for i in range(10):
        about = json.dumps({"text": f"first {i}", "caption": f"second {i}", "kind": i % 4}).encode()
        members += [(f"{i}.in.png", png(i + 1)), (f"{i}.out.png", png(i)), (f"{i}.json", about)]
        members += [(f"{i}.cls", str(i % 2).encode()), (f".{i}.hidden.png", b"")]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="several images: choose with --image"):
        prepare(tmp_path / "a.tar", tmp_path / "none")
    with pytest.raises(UserError, match="choose with --caption"):
        prepare(tmp_path / "a.tar", tmp_path / "none", image="out.png", overwrite=True)
    prepare(tmp_path / "a.tar", tmp_path / "store", image="out.png", caption="caption")
    names = ("0", "1")
    assert_holds(tmp_path / "store", range(10), lambda i: f"second {i}", names, lambda i: i % 2)
    prepare(tmp_path / "a.tar", tmp_path / "kind", image="out.png", caption="text", label="kind")
    names = ("0", "1", "2", "3")
    assert_holds(tmp_path / "kind", range(10), lambda i: f"first {i}", names, lambda i: i % 4)
    with pytest.raises(UserError, match="10 of 10 items"):
        prepare(tmp_path / "a.tar", tmp_path / "other", image="out.png", caption="title")


def test_what_is_wrong_in_a_tar_is_listed(tmp_path):
    kinds = {"png": png, "txt": lambda i: b"x"}
    members = [(f"{i:02d}.{kind}", read(i)) for i in range(40) for kind, read in kinds.items()]
    members[0] = ("00.png", b"no image")
    members[3] = ("01.txt", b"\xff")
    del members[7]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", members[6:])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:20_000])
    with pytest.raises(UserError, match="cannot be read") as caught:
        prepare(tmp_path, tmp_path / "store")
    for text in ("a.tar/00", "a.tar/01", "a.tar/03 and 1 more: no caption", "b.tar: it is damaged"):
        assert text in str(caught.value)
    index = prepare(tmp_path, tmp_path / "store", skip_bad=True)
    assert [item for item, _ in index["skipped"]][:3] == ["a.tar/00", "a.tar/01", "a.tar/03"]
    assert 37 < index["samples"] < 37 + 37
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(UserError, match="is compressed"):
        prepare(tmp_path / "c.tar", tmp_path / "packed")
    (tmp_path / "d.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(UserError, match="damaged"):
        prepare(tmp_path / "d.tar", tmp_path / "none")


def test_a_tar_is_continued(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [(f"{i:02d}.png", png(i)) for i in range(70)])
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    appended = blocks.Blocks.append

    def stopped(self, arrays):
        if len(self.ended) + len(self._running) > 0:
            self.wait()
            raise KeyboardInterrupt
        appended(self, arrays)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(blocks.Blocks, "append", stopped)
        prepare(tmp_path / "a.tar", tmp_path / "store")
    assert json.loads((tmp_path / "store/unfinished.json").read_text())["samples"] == 32
    prepare(tmp_path / "a.tar", tmp_path / "store")
    assert_holds(tmp_path / "store")


def test_options_of_records_are_refused_elsewhere(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    for source in (tmp_path, "digits"):
        with pytest.raises(UserError, match="--label kind"):
            prepare(source, tmp_path / "store", label="kind")
    with pytest.raises(UserError, match="these are arrays"):
        prepare("digits", tmp_path / "store", size=(8, 8))
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match="several splits"):
        prepare(tmp_path, tmp_path / "store")


def test_without_pyarrow_its_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="needs the package pyarrow"):
        prepare(tmp_path / "a.parquet", tmp_path / "store")


def table(rows, **extra):
    """A table as ``datasets`` has it: images as records, and features in its metadata."""
    arrow = pytest.importorskip("pyarrow")
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in rows]
    columns = {"img": images, "label": [i % 3 for i in rows], "text": [f"t {i}" for i in rows], **extra}
    info = {"features": {"label": {"names": ["c", "a", "b"], "_type": "ClassLabel"}}}
    found = arrow.table(columns)
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": info})}), info


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, rows in (("a", range(50)), ("b", range(50, 70))):
        parquet.write_table(table(rows)[0], tmp_path / f"{name}.parquet", row_group_size=20)
    prepare(tmp_path, tmp_path / "store", workers=3)
    names = ("c", "a", "b")
    assert_holds(tmp_path / "store", range(70), lambda i: f"t {i}", names, lambda i: i % 3)
    two = table(range(5), other=[png(i) for i in range(5)])[0]
    parquet.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(UserError, match="several columns of images"):
        prepare(tmp_path / "two.parquet", tmp_path / "two")
    prepare(tmp_path / "two.parquet", tmp_path / "two", image="other")
    assert_holds(tmp_path / "two", range(5), lambda i: f"t {i}", names, lambda i: i % 3)
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"PAR1" * 9):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read"):
            prepare(tmp_path / "a.parquet", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_data_set_on_disk(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "saved"
    folder.mkdir()
    found, info = table(range(70))
    name = "data-00000-of-00001.arrow"
    with (
        arrow.OSFile(str(folder / name), "wb") as sink,
        arrow.ipc.new_stream(sink, found.schema) as writer,
    ):
        writer.write_table(found, max_chunksize=30)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    prepare(folder, tmp_path / "store")
    data = assert_holds(tmp_path / "store", range(70), lambda i: f"t {i}", ("c", "a", "b"), lambda i: i % 3)
    assert torch.equal(data.conditioning(torch.tensor([4]))["label"], torch.tensor([1]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(UserError, match="does not name the files"):
        prepare(folder, tmp_path / "none")
