"""The cards of exported students of pipelines: their code gives what the student was trained on."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

import distmatch as dm
from distmatch.interop import export_lora, export_pipeline
from distmatch.interop.lora import network_in
from tests.helpers.pipelines import SIZE
from tests.interop.test_pipeline_export import PROMPT, folders, gaps, student_of

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

__all__ = ["folders"]  # the fixture


def code_of_card(folder, base) -> str:
    """The code of a card, with its folders filled in, without the last line, which is the call."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    code = code.replace("folder/of/the/base", str(base)).replace("this/folder", str(folder))
    return code.rpartition("\n")[0]


@pytest.mark.parametrize("name", ["stable-diffusion-3", pytest.param("wan", marks=pytest.mark.slow)])
def test_the_cards_code_loads_the_base_as_the_adapters_were_trained_on_it(name, folders, tmp_path):
    """The rounded base is another network; diffusers would keep some weights of Wan's in float32."""
    folder, plain = folders(name)
    teacher = dm.load_teacher(folder, dtype="bfloat16", **SIZE[name])
    told = teacher.pipeline.encode([PROMPT, "a dog"])
    # Wan converts encodings to the dtype of its network.
    assert all(torch.equal(told[k], v) for k, v in plain.pipeline.encode([PROMPT, "a dog"]).items())
    options = {"train": "lora", "lora_rank": 2, "base_dtype": "bfloat16", "lr": 1e-3}
    student = dm.distill(teacher, told, method="diff-instruct", steps=5, batch=2, quiet=True, **options)
    student.save_pretrained(tmp_path / "student")
    export_lora(student, tmp_path / "out")
    contract = json.loads((tmp_path / "out/distmatch.json").read_text())
    assert (contract["base"]["dtype"], contract["dtype"]) == ("bfloat16", "float32")
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("import torch\n") == 1
    found = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch_dtype has another name in later releases of diffusers
        exec(code_of_card(tmp_path / "out", folder), found)
    pipe = found["pipeline"]
    pipe.set_progress_bar_config(disable=True)
    kinds = {
        p.dtype for part in pipe.components.values() if hasattr(part, "parameters") for p in part.parameters()
    }
    assert kinds == {torch.float32}
    whole = copy.deepcopy(student.merged()).float()
    theirs = getattr(pipe, teacher.pipeline.tracer.network_name)
    pipe.fuse_lora()
    ours = network_in(whole.denoiser)
    for layer, parameter in ours.named_parameters():
        module, _, last = layer.rpartition(".")
        other = theirs.get_submodule(module)
        other = other.get_base_layer() if hasattr(other, "get_base_layer") else other
        torch.testing.assert_close(getattr(other, last), parameter, rtol=0, atol=1e-5)
    # Prompts as text: the student encodes them itself.
    assert max(gaps(pipe, dm.Student.from_pretrained(tmp_path / "student").float(), teacher, name)) < 1e-4
    for layer, buffer in ours.named_buffers():
        torch.testing.assert_close(theirs.get_buffer(layer), buffer, rtol=0, atol=1e-6)


def test_the_card_seeds_the_fresh_noise_of_the_steps(folders, tmp_path):
    """diffusers' flow scheduler draws it from torch's own stream, whatever generator the call has."""
    _, teacher = folders("stable-diffusion-3")
    export_pipeline(student_of(teacher, 3, sampler="stochastic"), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert text.count("import torch\n") == 1
    assert "torch.manual_seed(0)" in text
    assert "float32" in text
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    options |= SIZE["stable-diffusion-3"]
    with torch.random.fork_rng(devices=[]):
        seeded = [pipe(PROMPT, **options, generator=torch.Generator().manual_seed(0))[0] for _ in range(2)]
        again = []
        for _ in range(2):
            torch.manual_seed(0)
            again.append(pipe(PROMPT, **options)[0])
    assert not torch.equal(*seeded)
    assert torch.equal(*again)
    export_pipeline(student_of(teacher, 2), tmp_path / "out")
    assert "manual_seed" not in (tmp_path / "out/README.md").read_text()
