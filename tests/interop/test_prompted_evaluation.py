"""Students of a pipeline measured against images with captions, and compared on prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from distmatch.data.images import read_image
from tests.helpers.command import command, done
from tests.helpers.pipelines import save

WORDS = ["a red cat", "the dog sleeps", "a house", "a small tree"]
SIZE = "--size 16 --max-tokens 12"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, a file of prompts, 30 images with captions, a student of them."""
    folder = tmp_path_factory.mktemp("measured")
    save("stable-diffusion-3", folder)
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        pixels = rng.integers(0, 256, (16 + i, 20, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": WORDS[i % 4]}) for i in range(30)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    line = f"distill --teacher {folder}/stable-diffusion-3 {SIZE} --prompts {folder}/images --method dmd2"
    done(f"{line} --steps 5 --batch 4 --train lora --cache {folder}/cache --out {folder}/run")
    return folder


@pytest.mark.slow
def test_images_with_captions_are_the_reference(place):
    answer = done(f"evaluate {place}/run --steps 2 --json").json()
    assert "of" not in answer["reference"]
    assert answer["evaluation"]["reference"] == f"{place}/images"
    assert answer["student"]["fd"]["n"] == 15
    found = np.load(place / "run" / "samples" / "reference.npz")
    images = [read_image(place / f"images/{i}.png", (16, 16)).transpose(1, 2, 0) for i in range(30)]
    for pixels, text in zip(found["x"], found["prompts"].tolist(), strict=True):
        same = [i for i, image in enumerate(images) if np.array_equal(image, pixels)]
        assert [WORDS[i % 4] for i in same] == [text]
    assert np.load(place / "run" / "samples" / "student.npz")["prompts"].tolist() == found["prompts"].tolist()
    assert done(f"evaluate {place}/run --data {place}/images --steps 2 --json").json()["student"] == {
        **answer["student"],
        "seconds_per_1000": pytest.approx(answer["student"]["seconds_per_1000"], abs=1e6),
    }


@pytest.mark.slow
def test_methods_with_a_discriminator_are_compared_on_images(place, tmp_path):
    line = f"compare --teacher {place}/stable-diffusion-3 {SIZE} --cache {place}/cache --train lora --batch 4"
    line += ' --methods dmd2,sid --seeds 1 --budget "5 steps" --eval-steps 2'
    answer = done(f"{line} --prompts {place}/images --out {tmp_path}/c --json").json()
    assert {run["status"] for run in answer["runs"]} == {"done"}
    assert answer["evaluation"]["n"] == 15
    assert "of" not in answer["reference"]
    refused = command(f"{line} --prompts {place}/prompts.txt --out {tmp_path}/d")
    assert refused.code == 2
    assert "dmd2: " in refused.err
    assert "needs real images" in refused.err
    assert not (tmp_path / "d").exists()
