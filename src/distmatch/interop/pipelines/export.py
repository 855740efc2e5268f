"""Students of pipelines for plain diffusers and for ComfyUI: adapters, or a whole pipeline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.base.files import (
    atomic_folder,
    atomic_json,
    atomic_write,
    check_model_folder,
    guard,
    read_json,
    save_tensors,
)
from distmatch.interop.card import card_of
from distmatch.interop.diffusers_parts import INDEX
from distmatch.interop.lora import network_in
from distmatch.interop.pipelines.loading import load_parts, quiet
from distmatch.interop.pipelines.lora_files import (
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    comfyui_tensors,
    diffusers_tensors,
)
from distmatch.interop.pipelines.matching_call import Match, matching_scheduler, whole_student
from distmatch.interop.pipelines.steps import FILE, metadata_of, with_schedule
from distmatch.nets.saved import CARD
from distmatch.nets.shared import adapted_of, dtype_of_base

_SCHEDULER = "scheduler"
_SEED = """
torch.manual_seed(0)  # repeats the samples: the fresh noise of the steps may ignore generator=
"""
_INSTEAD = "export it with --to onnx, or --to safetensors"


def export_pipeline(
    student: Any, folder: str | os.PathLike[str], *, metrics: Mapping[str, Any] | None = None
) -> float:
    """Writes a student as a whole pipeline: ``DiffusionPipeline.from_pretrained`` and a plain call sample it.

    The network has the student's weights, adapters merged, and the scheduler takes its steps; all other
    parts are copies of the teacher's. The pipeline is called and compared with the student before it takes
    its place.

    Args:
        student: A student of a teacher of :func:`load_pipeline`.
        folder: The folder to write; an earlier export in it is replaced.
        metrics: The content of ``metrics.json``, for the card.

    Returns:
        The largest difference from the student's samples, relative to their largest value.

    Raises:
        UserError: No plain call gives this student's samples, the teacher's folder is not found, or the
            folder holds something else.
    """
    source, folder = _checked(student), Path(folder)
    index = read_json(source / INDEX)
    parts = [name for name, entry in index.items() if isinstance(entry, list) and (source / name).is_dir()]
    check_model_folder(folder, (*parts, INDEX, CARD, FILE))
    whole = whole_student(student)
    name = whole.denoiser.pipeline.tracer.network_name
    with quiet(), atomic_folder(folder) as temporary:
        for part in parts:
            if part != name:
                guard(partial(shutil.copytree, source / part, temporary / part), folder)
        atomic_json(temporary / INDEX, index)
        network: Any = network_in(whole.denoiser)
        guard(lambda: network.save_pretrained(temporary / name, safe_serialization=True), folder)
        written, _ = load_parts(temporary)
        match = matching_scheduler(whole, written, name)
        shutil.rmtree(temporary / _SCHEDULER)
        match.scheduler.save_pretrained(temporary / _SCHEDULER)
        index[_SCHEDULER] = ["diffusers", type(match.scheduler).__name__]
        atomic_json(temporary / INDEX, index)
        _describe(temporary, student, whole, match, metrics, _pipeline_usage)
    return match.difference


def export_lora(
    student: Any, folder: str | os.PathLike[str], *, metrics: Mapping[str, Any] | None = None
) -> float:
    """Writes the adapters of a student for ``load_lora_weights`` of its pipeline, and for ComfyUI.

    The folder holds ``pytorch_lora_weights.safetensors``; ``comfyui.safetensors`` for networks that ComfyUI
    loads adapters of; the scheduler that takes the student's steps; and a card with the call. The adapters
    are loaded into the pipeline and compared with the student before the folder takes its place.

    Args:
        student: A student with adapters of a teacher of :func:`load_pipeline`.
        folder: The folder to write; an earlier export in it is replaced.
        metrics: The content of ``metrics.json``, for the card.

    Returns:
        The largest difference from the student's samples, relative to their largest value.

    Raises:
        UserError: The student has no adapters, no plain call gives its samples, the teacher's folder is not
            found, or the folder holds something else.
    """
    source, folder = _checked(student), Path(folder)
    if adapted_of(student.denoiser) is None:
        raise UserError(
            "this student has no adapters",
            got="a full network",
            expected="a student of --train lora",
            fix="export it with --to pipeline",
        )
    kind = type(student.denoiser.pipeline.tracer.pipeline)
    if not hasattr(kind, "load_lora_weights"):
        raise UserError(
            f"a {kind.__name__} of diffusers loads no adapters",
            fix="export it with --to pipeline, or use the adapters in the model folder with peft",
        )
    check_model_folder(folder, (DIFFUSERS_FILE, COMFYUI_FILE, _SCHEDULER, CARD, FILE))
    whole, network = whole_student(student), network_in(student.denoiser)
    name = whole.denoiser.pipeline.tracer.network_name
    metadata = metadata_of(with_schedule(student.denoiser, student.description()))
    with quiet(), atomic_folder(folder) as temporary:
        save_tensors(temporary / DIFFUSERS_FILE, diffusers_tensors(network, name), metadata)
        comfyui = comfyui_tensors(network)
        if comfyui is not None:
            save_tensors(temporary / COMFYUI_FILE, comfyui, metadata)
        written, _ = load_parts(source)
        rounded = getattr(torch, str(dtype_of_base(student.denoiser)))
        for weight in getattr(written, name).state_dict().values():  # as in the card
            weight.copy_(weight.to(rounded))
        written.load_lora_weights(temporary, weight_name=DIFFUSERS_FILE)
        match = matching_scheduler(whole, written, name)
        match.scheduler.save_pretrained(temporary / _SCHEDULER)
        _describe(temporary, student, student, match, metrics, partial(_lora_usage, name))
    return match.difference


def _checked(student: Any) -> Path:
    """The folder of the pipeline that a student is of.

    Raises:
        UserError: It is of none, its sampler has no counterpart in diffusers, or the folder is not there.
    """
    found = getattr(student.denoiser, "pipeline", None)
    if found is None:
        raise UserError(
            "only a student of a pipeline with prompts can be exported for one",
            got=f"a student with a {type(getattr(student.denoiser, 'net', student.denoiser)).__name__}",
            expected="a teacher that is a pipeline of diffusers, as of dm.load_teacher(FOLDER)",
            fix=_without_pipeline(student),
        )
    if student.transport is not None:
        raise UserError(
            "pipelines of diffusers start from noise, and this student from stored samples", fix=_INSTEAD
        )
    if len(student.sigmas) > 1 and student.sampler not in ("stochastic", "ddim"):
        raise UserError(
            "no scheduler of diffusers takes the steps of this student",
            got=f"{len(student.sigmas)} steps with the sampler {student.sampler}",
            expected="one step, or the sampler stochastic or ddim",
            fix=_INSTEAD,
        )
    if found.folder is None or not (found.folder / INDEX).is_file():
        raise UserError(
            "the pipeline of this student's teacher is not found, and its other parts are needed",
            got=found.folder,
            expected=f"a folder with a {INDEX}",
            fix="pass its folder: --base FOLDER, in Python base= of Student.from_pretrained",
        )
    return Path(found.folder)


def _without_pipeline(student: Any) -> str:
    """What to do with a student of another teacher."""
    if adapted_of(student.denoiser) is not None:
        return (
            "its model folder holds adapters in the format of peft already, adapter_model.safetensors; "
            "or export it with merged weights: --to safetensors, diffusers or onnx"
        )
    return "export it with --to safetensors, diffusers or onnx"


def _describe(
    folder: Path,
    student: Any,
    written: Any,
    match: Match,
    metrics: Mapping[str, Any] | None,
    usage: Callable[[Mapping[str, Any], Match], str],
) -> None:
    """Writes the schedule contract and the card; ``written`` is the student as the folder has it."""
    about = with_schedule(student.denoiser, student.description())
    contract: dict[str, Any] = about["schedule"]
    contract |= {
        "scheduler": type(match.scheduler).__name__,
        "start": match.start,
        "difference": match.difference,
        "dtype": "float32",
        "call": {**contract["call"], **match.call},
    }
    atomic_json(folder / FILE, contract)
    about = {**about, "schedule": contract}
    card = card_of(
        written.denoiser, about, usage=usage(contract, match), library="diffusers", metrics=metrics
    )
    atomic_write(folder / CARD, card)


def _pipeline_usage(contract: Mapping[str, Any], match: Match) -> str:
    return _with_imports(f"""# The network is in float32.
pipeline = diffusers.DiffusionPipeline.from_pretrained("this/folder")
{_call(contract)}""")


def _lora_usage(name: str, contract: Mapping[str, Any], match: Match) -> str:
    scheduler, dtype = type(match.scheduler).__name__, contract["base"]["dtype"]
    return _with_imports(f"""{_loaded(name, dtype)}
# For ComfyUI put {COMFYUI_FILE}, where there is one, into models/loras, and sample with cfg 1.
pipeline.load_lora_weights("this/folder", weight_name="{DIFFUSERS_FILE}")
pipeline.scheduler = diffusers.{scheduler}.from_pretrained("this/folder", subfolder="{_SCHEDULER}")
{_call(contract)}""")


def _with_imports(code: str) -> str:
    torch_too = "import torch\n" if "torch." in code else ""
    return f"import diffusers\n{torch_too}\n{code}"


def _loaded(name: str, dtype: str) -> str:
    """Code that loads the base as the adapters were trained on it."""
    if dtype == "float32":
        return 'pipeline = diffusers.DiffusionPipeline.from_pretrained("folder/of/the/base")'
    return f"""# The adapters were trained on the network in {dtype}: its weights are rounded,
# and then used in float32. In place of these lines torch_dtype=torch.{dtype} samples in {dtype},
# the same but for rounding.
pipeline = diffusers.DiffusionPipeline.from_pretrained("folder/of/the/base")
for weight in pipeline.{name}.state_dict().values():
    weight.copy_(weight.to(torch.{dtype}))"""


def _call(contract: Mapping[str, Any]) -> str:
    """The call with the student's steps, and with guidance off."""
    options = {"num_inference_steps": contract["num_steps"], **contract["call"]}
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    seed = ""
    if contract["num_steps"] > 1 and contract["sampler"] == "stochastic":
        seed = _SEED
    return f'{seed}images = pipeline("a prompt", {arguments})[0]'
