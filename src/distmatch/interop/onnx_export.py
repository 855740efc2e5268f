"""Students as ONNX graphs: any number of calls, any batch size, checked in onnxruntime before they stay."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.base.files import atomic_folder, atomic_json, atomic_write, check_model_folder
from distmatch.diffusion.latents import decoder_of
from distmatch.interop.card import card_of
from distmatch.interop.frozen import Portable, StudentLike
from distmatch.interop.optional import import_onnxruntime
from distmatch.nets.saved import CARD

FORMAT = "distmatch-onnx"
VERSION = 1
TOLERANCE = 1e-4
_GRAPH, _WEIGHTS, _CONFIG = "model.onnx", "model.onnx.data", "config.json"
_OPSET = 18  # the one that torch's translations are written in: nothing has to be converted
_ONE_FILE = 2**30  # bytes of weights beyond which they get a file of their own; a graph can hold 2 GiB
_BATCHES = (1, 3)  # sizes of the check; the graph was made at another


def export_onnx(
    student: StudentLike, folder: str | os.PathLike[str], *, metrics: Mapping[str, Any] | None = None
) -> float:
    """Writes a student as ``model.onnx``, with ``config.json`` and a model card.

    The graph has the inputs ``noise``, ``noise_1``, ..., unit noise for each call, each (B, *shape) float32,
    and ``labels`` (B,) int64 for a student with classes. Its output ``samples`` (B, *shape) is in model
    space: images in [-1, 1], or latents where the student works on them.

    Args:
        student: The student.
        folder: The folder to write; an earlier export in it is replaced.
        metrics: The content of ``metrics.json``, for the card.

    Returns:
        The largest difference from the student that was found, in units of model space.

    Raises:
        UserError: A package is missing, the student cannot be expressed, the graph does not agree with it, or
            the folder holds something else.
    """
    runtime = import_onnxruntime()
    folder = Path(folder)
    check_model_folder(folder, (_GRAPH, _WEIGHTS, _CONFIG, CARD))
    portable = Portable(student)
    about = student.description()
    names = _input_names(portable)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": {name: ["batch", *(student.shape if name != "labels" else ())] for name in names},
        "outputs": {"samples": ["batch", *student.shape]},
        "space": "latents" if decoder_of(student.denoiser) is not None else "samples",
        "extra": about,
    }
    card = card_of(student.denoiser, about, usage=_usage(student, names), library="onnx", metrics=metrics)
    with atomic_folder(folder) as temporary:
        _write_graph(portable, names, temporary / _GRAPH)
        difference = _difference(runtime, portable, names, temporary / _GRAPH)
        atomic_json(temporary / _CONFIG, config)
        atomic_write(temporary / CARD, card)
    return difference


def _input_names(portable: Portable) -> list[str]:
    noise = ["noise" if index == 0 else f"noise_{index}" for index in range(portable.draws)]
    return [*noise, *(["labels"] if portable.conditional else [])]


def _write_graph(portable: Portable, names: list[str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    weights = sum(p.numel() * p.element_size() for p in portable.parameters())
    try:
        with _quiet():
            torch.onnx.export(
                portable,
                portable.inputs(2),
                path,
                input_names=names,
                output_names=["samples"],
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=(tuple({0: batch} for _ in names),),
                external_data=weights > _ONE_FILE,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            "this student cannot be written as a graph of ONNX",
            got=str(error.__cause__ or error).strip().splitlines()[0],
            expected="a network and a start that do the same whatever the values in a batch are",
            fix="export it with --to safetensors",
        ) from error


def _difference(runtime: Any, portable: Portable, names: list[str], path: Path) -> float:
    """The largest difference between graph and student, at batch sizes that the graph was not made at.

    Raises:
        UserError: It is too large.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = relative = 0.0
    for n in _BATCHES:
        inputs = portable.inputs(n, seed=n)
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        found = torch.from_numpy(session.run(["samples"], fed)[0])
        expected = portable.expected(inputs)
        far = float((found - expected).abs().max())
        worst, relative = max(worst, far), max(relative, far / max(1.0, float(expected.abs().max())))
    if not relative <= TOLERANCE:
        raise UserError(
            "the graph does not give the student's samples, so it was not kept",
            got=f"a relative difference of {relative:.2g} in onnxruntime",
            expected=f"at most {TOLERANCE:g}",
            fix="export it with --to safetensors; another version of onnxruntime may do better",
        )
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch's exporter says of itself and of packages that nobody asked for from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _usage(student: StudentLike, names: list[str]) -> str:
    shape = ", ".join(map(str, student.shape))
    feeds = [f'    "{name}": rng.standard_normal((16, {shape})).astype("float32"),' for name in names]
    if names[-1] == "labels":
        feeds[-1] = f'    "labels": rng.integers({student.num_classes}, size=16),'
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("this/folder/model.onnx")',
            "rng = np.random.default_rng(0)",
            "inputs = {",
            *feeds,
            "}",
            'samples = session.run(["samples"], inputs)[0]',
        ]
    )
