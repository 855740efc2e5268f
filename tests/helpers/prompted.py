"""A pipeline with prompts and captioned images on disk."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from tests.helpers.pipelines import save

PROMPTS = ["a red cat", "the dog sleeps", "a house", "a small tree"]
SIZE = "--size 16 --max-tokens 12"
SHORT = "--method sid --steps 10 --batch 2 --train lora --lora-rank 2 --seed 3"


def prompted(folder):
    """A pipeline, a file of prompts, a folder of images with captions."""
    save("stable-diffusion-3", folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(16, 16), (20, 40), (33, 16), (16, 18)]):
        pixels = rng.integers(0, 256, (height, width, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i]}) for i in range(4)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    return folder
