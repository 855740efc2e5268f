"""Runs and files, good and bad, and what a refusal of the command line looks like."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.command import SHORT, TINY, command, done, weights


def make_inputs(folder: Path) -> None:
    """Runs ``t`` (teacher), ``s`` (student), ``u`` (unconditional teacher), and files good and bad."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done(f"train {TINY} {SHORT} --out t")
        done(f"train {TINY} {SHORT} --no-labels --out u")
        done(f"distill --teacher t {SHORT} --out s")
        rng = np.random.default_rng(0)
        images = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8)
        floats = images.astype(np.float32) / 255
        np.savez("images.npz", x=images)
        np.savez("vectors.npz", x=rng.normal(size=(40, 3)).astype(np.float32))
        np.savez("large.npz", x=rng.integers(0, 255, (40, 9, 9), dtype=np.uint8))
        np.savez("nan.npz", x=np.where(np.arange(64).reshape(8, 8) == 5, np.nan, floats))
        np.savez("inf.npz", x=np.where(np.arange(64).reshape(8, 8) == 5, np.inf, floats))
        np.savez("negative.npz", x=images, labels=np.arange(40) - 3)
        np.savez("huge.npz", x=images, labels=np.arange(40) * 1000)
        np.savez("fractions.npz", x=images, labels=np.arange(40) / 2)
        np.savez("short.npz", x=images, labels=np.arange(39) % 10)
        np.savez("twelve.npz", x=images, labels=np.arange(40) % 12)
        np.savez("flat.npz", x=np.arange(10.0))
        np.savez("nobody.npz", x=np.zeros((0, 8, 8), np.uint8))
        np.savez("objects.npz", x=np.array([{"a": 1}, None], dtype=object))
        np.savez("text.npz", x=np.array([["a", "b"], ["c", "d"]]))
        Path("empty.npz").write_bytes(b"")
        Path("cut.npz").write_bytes(Path("images.npz").read_bytes()[:-200])
        Path("words.npz").write_text("these are words")
        np.save("vectors.npy", rng.normal(size=(40, 3)))
        Path("cut.npy").write_bytes(Path("vectors.npy").read_bytes()[:300])
        Path("data.pkl").write_bytes(pickle.dumps(images))
        Path("begun").mkdir()
        shutil.copy("t/config.toml", "begun/config.toml")
        Image.fromarray(images[0]).save("picture.png")
        Path("hollow").mkdir()
        Path("notes").mkdir()
        Path("notes/read.txt").write_text("words")
        Path("wrong.toml").write_text('verb = "train"\n[run]\nstepz = 3\n')
        Path("typed.toml").write_text('verb = "train"\n[run]\nsteps = "many"\n')
        Path("broken.toml").write_text("verb = train\n")
        for name in ("pickled", "cut", "foreign", "other", "newer"):
            shutil.copytree("t/model", f"models/{name}")
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(2)}, buffer)
        Path("models/pickled/model.safetensors").write_bytes(buffer.getvalue())
        Path("models/cut/model.safetensors").write_bytes(weights("t")[:-100])
        Path("models/foreign/config.json").write_text('{"model_type": "unet"}')
        config = json.loads(Path("models/other/config.json").read_text())
        Path("models/other/config.json").write_text(
            json.dumps({**config, "net": {**config["net"], "width": 48}})
        )
        Path("models/newer/config.json").write_text(json.dumps({**config, "version": 99}))
        Path("model.pt").write_bytes(buffer.getvalue())


def refused(line: str, *words: str) -> None:
    """`distmatch LINE` ends with 2 and one message with these words; the fixture sees what it wrote."""
    answer = command(line)
    assert answer.code == 2, answer
    assert answer.out == ""
    # Besides warnings, a busy machine prints how far it is.
    told = [text for text in answer.err.splitlines() if not text.startswith("warning: ")]
    messages = [text for text in told if ", elapsed " not in text]
    assert len(messages) == 1, answer.err
    assert messages[0].startswith(f"distmatch {line.split()[0]}: ")
    assert "Traceback" not in answer.err
    assert any(part in messages[0] for part in ("Got: ", "Expected: ", "Fix: ")), messages[0]
    for word in words:
        assert word in messages[0], messages[0]
