"""Schedulers of diffusers in the folder of a pipeline: which are understood, and which are refused."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from distmatch.base.errors import UserError
from distmatch.interop.pipelines import load_pipeline
from tests.helpers.pipelines import SIZE, diffusers, save

# Of diffusers, on configs that it would write otherwise today.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
SD, SD3 = "stable-diffusion", "stable-diffusion-3"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedulers")
    return {name: save(name, folder) for name in (SD, SD3)}


@pytest.fixture
def load(place):
    """A teacher from the folder of a pipeline with another scheduler in it."""

    def loaded(name: str, kind: str, **options: Any) -> Any:
        folder = place[name]
        shutil.rmtree(folder / "scheduler")
        getattr(diffusers, kind)(**options).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
        return load_pipeline(folder, **SIZE[name])

    return loaded


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", V),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
        ("SASolverScheduler", {}),
        ("DEISMultistepScheduler", {}),
        ("DEISMultistepScheduler", V),
    ],
)
def test_noise_rates_are_understood_where_the_class_takes_them(load, kind, options):
    """All steps show the clean sample but for PNDM, whose first step alone does, and is less exact."""
    teacher = load(SD, kind, **options)
    assert teacher.pipeline.schedule.family == "discrete"
    assert teacher.pipeline.schedule.prediction == ("v" if options == V else "eps")
    assert teacher.conversion.points >= (20 if kind.startswith("PNDM") else 50)
    assert teacher.conversion.relative < 1e-4
    with pytest.raises(UserError, match="not one for the network of a StableDiffusion3Pipeline") as raised:
        load(SD3, kind, **options)
    assert kind in raised.value.parts["got"]
    assert "noise rates" in raised.value.parts["got"]
    assert "FlowMatchEulerDiscreteScheduler" in raised.value.parts["expected"]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        (SD3, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        (SD3, "UniPCMultistepScheduler", FLOW),
        (SD3, "DPMSolverMultistepScheduler", FLOW),
        (SD3, "SASolverScheduler", FLOW),
        (SD, "UniPCMultistepScheduler", FLOW),  # U-Nets are trained for flows, too
    ],
)
def test_flows_are_understood(load, name, kind, options):
    teacher = load(name, kind, **options)
    assert (teacher.pipeline.schedule.family, teacher.pipeline.shift) == ("flow", 3.0)
    assert teacher.conversion.relative < 1e-5


@pytest.mark.parametrize(
    ("name", "kind", "options", "words"),
    [
        (SD3, "FlowMatchHeunDiscreteScheduler", {}, "not those of a straight flow"),
        (SD3, "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "not those of a straight"),
        (SD3, "DEISMultistepScheduler", FLOW, "not those of a straight flow"),
        (SD3, "UniPCMultistepScheduler", {"use_flow_sigmas": True}, "contradict"),
        (SD3, "FlowMatchLCMScheduler", {}, "not supported"),
        (SD, "DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "contradict"),
        (SD, "LCMScheduler", {}, "is no teacher"),
        (SD, "TCDScheduler", {}, "is no teacher"),
        (SD, "PNDMScheduler", {**V, "skip_prk_steps": True}, "does not show its clean samples"),
        (SD, "EDMEulerScheduler", {}, "networks of EDM's kind"),
        (SD, "FlowMatchEulerDiscreteScheduler", {}, "its FlowMatchEulerDiscreteScheduler"),
        (SD, "FlowMatchHeunDiscreteScheduler", {}, "its FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_others_are_refused_with_what_was_seen(load, name, kind, options, words):
    with pytest.raises(UserError) as raised:
        load(name, kind, **options)
    assert words in str(raised.value)


def test_a_class_for_noise_rates_alone_takes_no_flow(tmp_path):
    """HunyuanDiT's pipeline names DDPM; the network is small, and its scheduler is what is read first."""
    folder = save("hunyuan-dit", tmp_path)
    diffusers.UniPCMultistepScheduler(**FLOW).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not one for the network of a HunyuanDiTPipeline") as raised:
        load_pipeline(folder, **SIZE["hunyuan-dit"])
    assert "flow matching" in raised.value.parts["got"]
    assert "noise rates" in raised.value.parts["expected"]
