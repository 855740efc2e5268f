"""Files that are not what they seem: pipes, devices, deep nesting, endless numbers, archives that unfold."""

import json
import os
import time
import zipfile

import numpy as np
import pytest

from distmatch.base.errors import UserError
from distmatch.base.files import load_tensors, read_json
from distmatch.base.inputs import parse_json, parse_toml, read_limited, require_regular_file
from distmatch.data.files import Archive
from distmatch.report.log import curves, read_log
from distmatch.report.run import read_samples
from distmatch.training.toml import read_toml


@pytest.mark.parametrize("read", [require_regular_file, read_limited, read_json, load_tensors, read_toml])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nul"])
def test_only_regular_files_are_read(read, kind, tmp_path):
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = str(path) + "\0"
    with pytest.raises(UserError):
        read(path)


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_json(tmp_path / "b") == [1]


def test_large_files_are_refused_by_their_size(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)  # sparse: no space is taken
    with pytest.raises(UserError, match="too large"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[" * 300 + "]" * 300, '{"a":' * 100_000])
def test_deep_json_is_one_message(text):
    with pytest.raises(UserError):
        parse_json(text)


def test_long_integers_in_json_are_floats():
    assert parse_json("1" * 5000) == float("inf")
    assert parse_json("-" + "1" * 200) == pytest.approx(-1.1111111111111111e199)
    assert parse_json(str(2**64 - 1)) == 2**64 - 1


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000 + "]" * 100_000,
        "a = " + "{b=" * 50_000 + "1" + "}" * 50_000,
        "a = " + "1" * 5000,
        ".".join("a" * 100_000) + " = 1",
        "[" + ".".join(['"a"'] * 50_000) + "]",
    ],
)
def test_hostile_toml_is_one_message_at_once(text):
    began = time.perf_counter()
    with pytest.raises(UserError):
        parse_toml(text)
    assert time.perf_counter() - began < 2


def _npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    "member",
    [b"hello", b"", _npy((10**15,)), _npy((2,), b"12345678"), _npy((-1,)), _npy((1,) * 40), _npy((2.5,))],  # type: ignore[arg-type]
)
def test_members_that_are_no_arrays_are_refused(member, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(UserError):
        Archive(tmp_path / "a.npz")["x"]
    with pytest.raises(UserError):
        read_samples(tmp_path / "a.npz")


def test_what_is_no_archive_is_refused(tmp_path):
    for content in (b"", b"PK\x03\x04", json.dumps([1]).encode()):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot read"):
            read_samples(tmp_path / "a.npz")


def test_a_log_with_numbers_beyond_reason_is_read(tmp_path):
    lines = ['{"event": "train", "step": 1, "loss": 1e308}', '{"event": "train", "step": 2, "loss": 1}']
    lines += ['{"event": "train", "step": 3, "loss": ' + "9" * 400 + "}"]
    lines += ['{"event": "train", "step": ' + "9" * 5000 + ', "loss": 2}', "[" * 100_000, '{"a":' * 99_999]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    events = read_log(tmp_path / "log.jsonl")
    assert len(events) == 4
    steps, values = curves(events, "loss")
    assert steps.tolist() == [1, 2, 3]
    assert np.isnan(values).tolist() == [True, False, True]
