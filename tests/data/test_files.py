"""Files: what is right is read exactly, what is wrong is named, nothing ends in a traceback."""

import dataclasses
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.data import from_arrays, load_data
from distmatch.data.batches import Batches

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 7, 9), dtype=np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (6, 7, 9, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def exported(data):
    return data.scaling.export(data.batch(torch.arange(len(data)))[0])


def savez(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(("key", "label_key"), [("x", "labels"), ("images", "y"), ("x_train", "y_train")])
def test_npz_keys(tmp_path, key, label_key):
    path = savez(tmp_path / "d.npz", **{"other": np.zeros(3), key: COLOR, label_key: LABELS})
    data = load_data(str(path))
    np.testing.assert_array_equal(exported(data), COLOR)
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()
    assert data.class_names == ("0", "1", "2")
    assert load_data(str(path), labels=False).labels is None


def test_the_only_array_and_class_names(tmp_path):
    path = savez(tmp_path / "d.npz", pictures=IMAGES, y=LABELS, class_names=np.array(["a", "b", "c"]))
    data = load_data(path)
    assert data.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(exported(data), IMAGES)
    assert load_data(path).content_hash == data.content_hash


def test_written_samples_can_be_read_again(tmp_path):
    """What a model without labels writes has labels -1 throughout: unlabeled."""
    data = load_data(savez(tmp_path / "d.npz", x=IMAGES, labels=np.full(6, -1)))
    assert data.num_classes == 0
    assert data.class_names == ()


def test_npy_and_compressed(tmp_path):
    vectors = np.random.default_rng(2).normal(size=(5, 3))
    np.save(tmp_path / "v.npy", vectors)
    data = load_data(tmp_path / "v.npy")
    np.testing.assert_allclose(exported(data), vectors, rtol=1e-6, atol=1e-6)
    np.savez_compressed(tmp_path / "v.npz", vectors)
    assert load_data(tmp_path / "v.npz").content_hash == data.content_hash


class Bomb:
    """Would write a file, were it ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "sprung"
    objects = np.array([Bomb(trap), None], dtype=object)
    np.save(tmp_path / "o.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "o.npz", x=objects)
    np.savez(tmp_path / "l.npz", x=IMAGES, labels=objects)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Bomb(trap)))
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Bomb(trap)))
    torch.save(torch.zeros(3), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Bomb(trap)))
    for name in ("o.npy", "o.npz", "l.npz", "p.npy", "p.npz", "t.pt", "m.npz"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_data(tmp_path / name)
    with pytest.raises(UserError, match="Python objects"):
        load_data(tmp_path / "o.npz")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"x": np.zeros((0, 3))}, "nothing in it"),
        ({"x": np.zeros((4, 0, 8))}, "nothing in it"),
        ({"x": np.ones((1, 8, 8))}, "too few samples"),
        ({"x": np.arange(9.0)}, r"x\[:, None\]"),
        ({"x": np.zeros((2, 3, 4, 5, 6, 7))}, "number of axes"),
        ({"x": np.zeros((4, 5, 6, 4), np.uint8)}, "1 or 3 channels"),
        ({"x": np.zeros((4, 3), complex)}, "not numbers"),
        ({"x": np.array([["a"], ["b"]])}, "not numbers"),
        ({"x": np.ones((4, 3))}, "all samples are the same"),
        ({"x": np.array([[1, 2], [np.nan, 1], [np.inf, 1]])}, r"2 of 6, the first \(nan\) at index \(1, 0\)"),
        ({"x": np.array([[1.0], [1e300]])}, r"1 of 2, the first \(1e\+300\)"),
        ({"a": IMAGES, "b": IMAGES}, "unclear which array"),
        ({"labels": LABELS}, "unclear which array"),
        ({"x": IMAGES, "y": LABELS[:5]}, r"shape \(5,\) for 6 samples"),
        ({"x": IMAGES, "y": np.eye(6)}, "argmax"),
        ({"x": IMAGES, "y": np.array(0)}, r"shape \(\)"),
        ({"x": IMAGES, "y": LABELS - 1}, "-1 at index 0"),
        ({"x": IMAGES, "y": LABELS + 0.5}, "0.5 at index 0"),
        ({"x": IMAGES, "y": LABELS * np.nan}, "whole numbers"),
        ({"x": IMAGES, "y": LABELS.astype(str)}, "np.unique"),
        ({"x": IMAGES, "y": LABELS.astype(np.uint64) + np.uint64(2**63)}, "class numbers"),
        ({"x": IMAGES, "y": LABELS, "class_names": np.array(["a"])}, "too few class names"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, word):
    with pytest.raises(UserError, match=word) as caught:
        load_data(savez(tmp_path / "d.npz", **arrays))
    assert "d.npz" in str(caught.value)


def test_labels_that_are_not_wanted_may_be_wrong(tmp_path):
    assert load_data(savez(tmp_path / "d.npz", x=IMAGES, y=LABELS[:5]), labels=False).labels is None


def test_whole_floats_are_labels():
    labels = from_arrays(IMAGES, LABELS.astype(np.float32)).labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("digit", "did you mean digits"),
        ("fashion_mnist:tset", "did you mean fashion_mnist:test"),
        ("digit", "no file or folder"),
        ("nowhere.npz", "does not exist"),
        ("no/where", "does not exist"),
        ("", "no data were named"),
        ("a\0b.npz", "path"),
        ("x" * 5000 + ".npz", "path"),
    ],
)
def test_unknown_names_and_missing_files(spec, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=word):
        load_data(spec)


def test_other_kinds_of_file(tmp_path):
    for name, word in (("t.dat", "type .dat"), ("t", "type unknown"), ("one.png", "a single image")):
        (tmp_path / name).write_bytes(b"1,2")
        with pytest.raises(UserError, match=word):
            load_data(tmp_path / name)


def damaged(whole, rng):
    """Cut at 40 places, and 120 copies with a changed byte, half of them in the header."""
    yield b""
    for cut in rng.integers(1, len(whole), 40):
        yield whole[:cut]
    for place in (*rng.integers(0, 100, 60), *rng.integers(0, len(whole), 60)):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", [".npz", ".npy", ".png", ".jpg", ".bmp", ".webp"])
def test_damaged_files_never_crash(tmp_path, suffix):
    """A damaged file is refused as the user's mistake, or (a changed pixel) is read; seed 0."""
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez_compressed(buffer, x=IMAGES, labels=LABELS)
    elif suffix == ".npy":
        np.save(buffer, IMAGES)
    else:
        Image.fromarray(COLOR[0]).save(buffer, Image.registered_extensions()[suffix])
        Image.fromarray(COLOR[1]).save(tmp_path / "a.png")
    refused = 0
    for content in damaged(buffer.getvalue(), np.random.default_rng(0)):
        (tmp_path / f"d{suffix}").write_bytes(content)
        try:
            load_data(tmp_path / f"d{suffix}" if suffix.startswith(".np") else tmp_path)
        except UserError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (6, 7, 9)",  # TokenError
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 7, 9)}",  # TypeError
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**70},)}}",  # OverflowError
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}",
        "{[]: 1}",
        "(" * 3000,
    ],
)
def test_hostile_headers_are_refused(tmp_path, header):
    text = header.encode() + b"\n"
    whole = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(400)
    (tmp_path / "d.npy").write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", whole)
    for name in ("d.npy", "d.npz"):
        with pytest.raises(UserError, match=name):
            load_data(tmp_path / name)


@pytest.mark.parametrize(("place", "value"), [(6, 1), (8, 93)])  # encrypted; a compression nobody knows
def test_archives_that_need_more_than_we_have(tmp_path, place, value):
    buffer = io.BytesIO()
    np.savez(buffer, x=IMAGES)
    content = bytearray(buffer.getvalue())
    directory = content.rfind(b"PK\x01\x02")
    content[place] = content[directory + place + 2] = value
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"encrypted|compression"):
        load_data(tmp_path / "d.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_may_be_damaged(tmp_path, method):
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    with zipfile.ZipFile(tmp_path / "d.npz", "w", method) as archive:
        archive.writestr("x.npy", buffer.getvalue())
    whole = (tmp_path / "d.npz").read_bytes()
    np.testing.assert_array_equal(exported(load_data(tmp_path / "d.npz")), IMAGES)
    for place in range(60, 200, 7):
        content = bytearray(whole)
        content[place] ^= 16
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"d\.npz"):
            load_data(tmp_path / "d.npz")


def test_an_archive_that_promises_more_than_it_holds(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, x=IMAGES)
    content = bytearray(buffer.getvalue().replace(b"(6, 7, 9)", b"(9, 9, 9)"))
    directory = content.rfind(b"PK\x01\x02")
    for size in (slice(directory + 20, directory + 24), slice(directory + 24, directory + 28)):
        content[size] = (10**6).to_bytes(4, "little")
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"EOFError|BadZipFile"):
        load_data(tmp_path / "d.npz")


def test_an_array_too_large_for_memory_is_refused(tmp_path):
    with open(tmp_path / "d.npy", "wb") as file:  # a header that promises 56 TiB
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 7, 8)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    with pytest.raises(UserError, match=r"d\.npy"):
        load_data(tmp_path / "d.npy")


def test_conditions_of_samples_are_read_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, text = rng.normal(size=(12, 3)).astype(np.float32), rng.normal(size=(12, 5, 4))
    file = tmp_path / "x.npz"
    np.savez(file, x=x, labels=np.arange(12) % 3, condition_text=text, condition_age=np.arange(12))
    data = load_data(file)
    rows = torch.tensor([7, 2])
    found = data.conditioning(rows)
    assert set(found) == {"label", "text", "age"}
    np.testing.assert_array_equal(found["text"].numpy(), text[[7, 2]].astype(np.float32))
    assert found["age"].tolist() == [7, 2]
    assert found["label"].tolist() == [1, 2]
    assert set(data.subset(rows).conditioning(torch.tensor([0]))) == set(found)
    turned = dataclasses.replace(data, conditions=data.conditions.index(torch.arange(11, -1, -1)))
    assert data.content_hash != turned.content_hash
    assert not load_data(file, labels=False).conditions
    batch = Batches(data, 4, seed=0)(0)
    assert batch.conditioning.batch_size == 4
    whole = data.scaling.to_model(data.raw)
    where = (whole[None] == batch.x[:, None]).all(2).int().argmax(1)
    assert torch.equal(batch.conditioning["text"], data.conditions["text"][where])


def test_conditions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    for name, values, said in (
        ("short", np.zeros(3), "condition_short must have one row for each sample"),
        ("words", np.array(["a", "b", "c", "d"]), "must contain numbers"),
        ("gap", np.array([0.0, 1.0, np.nan, 2.0]), "NaN or infinity"),
        ("label", np.zeros(4), "passed as labels"),
    ):
        file = tmp_path / f"{name}.npz"
        np.savez(file, x=x, **{f"condition_{name}": values})
        with pytest.raises(UserError, match=said):
            load_data(file)
