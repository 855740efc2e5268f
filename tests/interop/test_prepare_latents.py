"""Stores of latents: equal to what a distillation encodes, and of one autoencoder only."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.data import toy
from distmatch.data.images import read_image
from distmatch.data.store.reading import load_store
from distmatch.interop.encodings import key_of
from distmatch.training import prompt_batches
from distmatch.training.latent_data import check_encodable
from distmatch.training.options import DistillOptions, RunOptions
from distmatch.training.prepare import prepare_distillation
from distmatch.training.prepare_latents import prepare_latents
from tests.helpers.command import command, done
from tests.helpers.pipelines import save

PROMPTS = ["a red cat", "the dog sleeps", "a house", "a small tree"]
SIZE = "--size 16 --max-tokens 12"
SHORT = "--method sid --steps 10 --batch 2 --train lora --lora-rank 2 --seed 3"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, images of any size with captions, and a store of their latents."""
    folder = tmp_path_factory.mktemp("latents")
    save("stable-diffusion-3", folder)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(16, 16, 3), (20, 40), (33, 16, 3), (16, 18, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"images/{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i]}) for i in range(4)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    done(f"prepare {folder}/images --teacher {folder}/stable-diffusion-3 {SIZE} --out {folder}/store")
    return folder


@pytest.fixture(scope="module")
def teacher(place):
    return dm.load_teacher(place / "stable-diffusion-3", height=16, width=16, max_sequence_length=12)


def test_latents_are_those_of_the_autoencoder(place, teacher):
    store = load_store(place / "store")
    assert list(store.captions) == PROMPTS
    vae = teacher.pipeline.tail
    for i in range(4):
        pixels = read_image(place / f"images/{i}.png", (16, 16), color=True)
        x = (torch.from_numpy(pixels).float() - 127.5) / 127.5
        gen = generator(0, f"encode/{key_of(x.numpy().tobytes(), str((3, 16, 16)))}")
        latent = vae.encode(x[None], torch.randn(teacher.shape, generator=gen)[None])
        torch.testing.assert_close(store.batch(torch.tensor([i]))[0], latent, rtol=1e-4, atol=1e-5)
    whole = store.batch(torch.arange(4))[0].double()
    assert store.std() == pytest.approx(float(whole.std(correction=0)), rel=1e-6)


def test_nothing_is_encoded_again_in_training(place, teacher, monkeypatch):
    monkeypatch.setattr(teacher.prompt_encoder, "encode", lambda *a, **k: pytest.fail("encoded again"))
    monkeypatch.setattr(prompt_batches, "drawn_latents", lambda *a: pytest.fail("encoded again"))
    options = replace(DistillOptions.of("sid"), data=f"{place}/store", run=RunOptions(steps=10, batch=2))
    job = prepare_distillation(options, teacher, load_store(place / "store"), dry=False, fresh=False)
    batch = job.batches(0)
    assert set(batch.texts) <= set(PROMPTS)
    rows = [PROMPTS.index(text) for text in batch.texts]
    assert torch.equal(batch.x, load_store(place / "store").batch(torch.tensor(rows))[0])


def test_a_store_of_latents_is_distilled(place, tmp_path):
    run = f"distill --teacher {place}/stable-diffusion-3 {SIZE} --data {place}/store {SHORT}"
    done(f"{run} --out {tmp_path}/run")
    assert not (tmp_path / "cache").exists()


def test_other_autoencoders_are_refused(place, teacher, monkeypatch):
    store = load_store(place / "store")
    check_encodable(store, teacher)
    monkeypatch.setattr(type(teacher.decoder), "fingerprint", "another")
    with pytest.raises(UserError, match="latents of another autoencoder"):
        check_encodable(store, teacher)


def test_what_cannot_be_encoded_is_refused(place, teacher, tmp_path):
    np.save(tmp_path / "small.npy", np.arange(192, dtype=np.uint8).reshape(4, 4, 4, 3))
    with pytest.raises(UserError, match="cannot be encoded"):
        prepare_latents(tmp_path / "small.npy", tmp_path / "store", teacher, torch.device("cpu"))
    with pytest.raises(UserError, match="no autoencoder"):
        prepare_latents(place / "images", tmp_path / "store", toy("ring8"), torch.device("cpu"))
    answer = command(f"prepare {place}/images --out {tmp_path}/store --tokens 8")
    assert answer.code == 2
    assert "--tokens does nothing without --teacher" in answer.err
    assert not (tmp_path / "store").exists()
