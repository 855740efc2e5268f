"""Encodings on disk: each made once, found by content, continued after an interruption, never half read."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.interop import encodings
from distmatch.interop.encodings import encoded, key_of

ENCODER, OTHER = "a" * 64, "b" * 64
TEXTS = [f"prompt {i}" for i in range(40)]


def row(text: str) -> torch.Tensor:
    """The encoding of a text, by another way than through files."""
    return torch.tensor([float(len(text)), float(sum(map(ord, text)))])


class Encoder:
    """Encodes texts and counts them; may be stopped."""

    def __init__(self, texts: list[str], stop: int | None = None) -> None:
        self.texts, self.stop, self.done = texts, stop, []

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        if self.stop is not None and len(self.done) >= self.stop:
            raise KeyboardInterrupt
        self.done += [self.texts[i] for i in rows]
        text = torch.stack([row(self.texts[i]) for i in rows])
        return {"text": text, "half": text.to(torch.bfloat16), "mask": text[:, 0] > 8}


def made(folder: Path, texts: list[str], encoder: Encoder, fingerprint: str = ENCODER):
    return encoded(folder, fingerprint, [key_of(t) for t in texts], encoder, what="prompts", batch=4)


def test_rows_are_those_of_their_texts(tmp_path, capsys):
    texts = [TEXTS[3], TEXTS[0], TEXTS[3], TEXTS[7]]
    encoder = Encoder(texts)
    rows = made(tmp_path, texts, encoder)
    assert encoder.done == [TEXTS[3], TEXTS[0], TEXTS[7]]  # equal ones once, in their order
    assert f"encoding 3 prompts: 0.0 MiB in {tmp_path}" in capsys.readouterr().err
    made(tmp_path, TEXTS[8:9], Encoder(TEXTS[8:9]))
    assert "encoding 1 prompt: " in capsys.readouterr().err
    assert len(rows) == 4
    found = rows.index(torch.tensor([3, 0, 2, 1, 3]))
    wanted = torch.stack([row(texts[i]) for i in (3, 0, 2, 1, 3)])
    assert torch.equal(found["text"], wanted)
    assert found["half"].dtype == torch.bfloat16
    assert torch.equal(found["mask"], wanted[:, 0] > 8)


def test_what_is_there_is_not_encoded_again(tmp_path):
    made(tmp_path, TEXTS[:10], Encoder(TEXTS[:10]))
    encoder = Encoder(TEXTS)
    rows = made(tmp_path, TEXTS, encoder)
    assert encoder.done == TEXTS[10:]
    again = Encoder(TEXTS[::-1])
    reversed_ = made(tmp_path, TEXTS[::-1], again)
    assert not again.done
    every = torch.arange(40)
    assert torch.equal(reversed_.index(39 - every)["text"], rows.index(every)["text"])
    assert torch.equal(rows.index(every)["text"], torch.stack([row(t) for t in TEXTS]))


def test_an_interrupted_encoding_continues(tmp_path):
    stopped = Encoder(TEXTS, stop=12)
    with pytest.raises(KeyboardInterrupt, match="prompts that were encoded are kept, and the same command"):
        made(tmp_path, TEXTS, stopped)
    encoder = Encoder(TEXTS)
    rows = made(tmp_path, TEXTS, encoder)
    assert encoder.done == TEXTS[12:]
    assert torch.equal(rows.index(torch.arange(40))["text"], torch.stack([row(t) for t in TEXTS]))


def test_remarks_on_items_are_kept_with_them(tmp_path):
    def remarked(texts):
        remarks, inner = {}, Encoder(texts)

        def compute(rows):
            for i in rows:
                if texts[i].endswith("3"):
                    remarks.setdefault("ends with 3", set()).add(i)
            return inner(rows)

        encoded(tmp_path, ENCODER, [key_of(t) for t in texts], compute, what="p", batch=4, remarks=remarks)
        return remarks, len(inner.done)

    assert remarked(TEXTS[:20]) == ({"ends with 3": {3, 13}}, 20)
    assert remarked(TEXTS[10:30]) == ({"ends with 3": {3, 13}}, 10)  # 13 from the file, 23 now
    assert remarked(TEXTS[4:10]) == ({}, 0)


def test_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "_SHARD_ROWS", 8)
    rows = made(tmp_path, TEXTS, Encoder(TEXTS))
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 5
    mixed = torch.tensor([39, 0, 17, 8, 7])
    assert torch.equal(rows.index(mixed)["text"], torch.stack([row(TEXTS[i]) for i in mixed]))


def test_encodings_of_another_encoder_are_not_taken(tmp_path):
    made(tmp_path, TEXTS, Encoder(TEXTS))
    encoder = Encoder(TEXTS)
    made(tmp_path, TEXTS, encoder, OTHER)
    assert encoder.done == TEXTS
    # Files that were moved into the folder of another encoder: they name their own.
    ours, theirs = tmp_path / ENCODER[:32], tmp_path / OTHER[:32]
    for file in theirs.iterdir():
        file.unlink()
    for file in ours.iterdir():
        shutil.copy(file, theirs / file.name)
    encoder = Encoder(TEXTS)
    made(tmp_path, TEXTS, encoder, OTHER)
    assert encoder.done == TEXTS


def test_damaged_and_half_written_files_are_not_read(tmp_path):
    made(tmp_path, TEXTS, Encoder(TEXTS))
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"x" * 100, whole[:-1]):
        file.write_bytes(content)
        (file.parent / f".{file.name}.x.tmp").write_bytes(whole)  # of a process that was killed
        encoder = Encoder(TEXTS)
        rows = made(tmp_path, TEXTS, encoder)
        assert encoder.done == TEXTS
        assert torch.equal(rows.index(torch.arange(40))["text"], torch.stack([row(t) for t in TEXTS]))


def test_the_disk_is_not_filled(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**30 + 100))
    with pytest.raises(UserError, match=r"encodings of 40 prompts do not fit.*--cache"):
        made(tmp_path, TEXTS, Encoder(TEXTS))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        made(tmp_path / "file", TEXTS, Encoder(TEXTS))


def _process(folder: Path, start: int) -> None:
    texts = TEXTS[start:] + TEXTS[:start]
    rows = made(folder, texts, Encoder(texts))
    wanted = torch.stack([row(t) for t in texts])
    raise SystemExit(0 if torch.equal(rows.index(torch.arange(40))["text"], wanted) else 3)


def test_several_processes_encode_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_process, args=(tmp_path, 10 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4


def test_keys_tell_parts_apart():
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("ab") == key_of(b"ab")
