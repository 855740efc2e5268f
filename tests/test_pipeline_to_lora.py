"""docs/pipeline-to-lora.md: its six commands, run in their order on a tiny pipeline with the same options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.helpers.command import command
from tests.helpers.pipelines import SIDE, diffusers, save

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pipeline-to-lora.md"
SMALLER = {"--size": str(SIDE), "--batch": "2", "--watch-every": "5"}


def commands() -> list[list[str]]:
    """The command lines of the page, without ``distmatch``."""
    blocks = re.findall(r"```\ndistmatch (.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def test_the_commands_of_the_readme_are_among_them():
    (block,) = re.findall(r"```\n(distmatch doctor .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines()]
    assert [line[0] for line in lines] == ["doctor", "distill", "report", "sample", "export"]
    assert all(line in commands() for line in lines)


@pytest.mark.cli
def test_the_six_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))
    save("stable-diffusion-3", tmp_path).rename("sd3")
    Path("prompts.txt").write_text("a red cat\na blue dog\nthe small green house\n")
    lines = commands()
    assert [line[0] for line in lines] == ["doctor", "distill", "distill", "report", "sample", "export"]
    for line in lines:
        line = [SMALLER.get(before, word) for before, word in zip(["", *line], line, strict=False)]
        line += ["--steps", "10", "--checkpoint-every", "5"] if line[0] == "distill" else []
        line += ["--max-tokens", "12"] if line[0] in ("doctor", "distill") else []
        answer = command(shlex.join(line))
        assert answer.code == 0, f"{line}: {answer.err}"
    assert Path("runs/sd3/report.html").is_file()
    assert Path("samples.png").is_file()

    pipeline = diffusers.DiffusionPipeline.from_pretrained("sd3")
    before = pipeline.transformer.state_dict()["pos_embed.proj.weight"].clone()
    pipeline.load_lora_weights("sd3-lora", weight_name="pytorch_lora_weights.safetensors")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        "sd3-lora", subfolder="scheduler"
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red cat",
        num_inference_steps=4,
        guidance_scale=1.0,
        height=SIDE,
        width=SIDE,
        max_sequence_length=12,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert image.isfinite().all()
    assert pipeline.transformer.state_dict()["pos_embed.proj.weight"].equal(before)
