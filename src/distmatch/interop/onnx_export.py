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
from torch import Tensor, nn

from distmatch.base.errors import UserError, cause
from distmatch.base.files import atomic_folder, atomic_json, atomic_write, check_model_folder
from distmatch.data import Scaling
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
    space: images in [-1, 1], or latents where the student works on them. Its output ``data`` holds the same
    samples in the units of the data, as `distmatch sample` writes them: images as uint8, (B, H, W) when grey
    and (B, H, W, C) otherwise; vectors as they were before they were scaled. Latents have none.

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
    about = student.description()
    latent = decoder_of(student.denoiser) is not None
    scaling = None if latent else Scaling.known(about.get("data") or {}, student.shape)
    portable = Portable(student)
    graph = _Outputs(portable, scaling)
    names = portable.names
    _check_names([*names, *graph.names])
    with torch.no_grad():
        made = [output[0] for output in graph(*portable.inputs(2))]
    config = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": {
            name: ["batch", *("any" if size < 0 else size for size in shape)]
            for name, shape in zip(names, _shapes(portable), strict=True)
        },
        "outputs": {n: ["batch", *x.shape] for n, x in zip(graph.names, made, strict=True)},
        "space": "latents" if latent else "samples",
        "extra": about,
    }
    card = card_of(
        student.denoiser,
        about,
        usage=_usage(portable, graph.names[-1]),
        library="onnx",
        metrics=metrics,
    )
    with atomic_folder(folder) as temporary:
        _write_graph(graph, names, temporary / _GRAPH)
        difference = _difference(runtime, graph, names, temporary / _GRAPH)
        atomic_json(temporary / _CONFIG, config)
        atomic_write(temporary / CARD, card)
    return difference


class _Outputs(nn.Module):
    """A student in plain operations, with its samples in model space and in the units of the data.

    Args:
        portable: The student.
        scaling: That of its data; None leaves the second output out.
    """

    def __init__(self, portable: Portable, scaling: Scaling | None) -> None:
        super().__init__()
        self.portable, self.scaling = portable, scaling
        self.names = ["samples"] if scaling is None else ["samples", "data"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of their names."""
        x = self.portable(*inputs)
        return (x,) if self.scaling is None else (x, self.scaling.in_units(x))


def _check_names(names: list[str]) -> None:
    """Refuses conditions whose names those of the other inputs and outputs are.

    Raises:
        UserError: There are such.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            "the inputs and outputs of a graph must have different names",
            got=f"a condition named {', '.join(twice)}",
            fix="declare the condition under another name, or export with --to safetensors",
        )


def _shapes(portable: Portable) -> list[tuple[int, ...]]:
    """Shapes of the inputs without the batch; -1 where any size is fine."""
    noise = [tuple(portable.student.shape)] * portable.draws
    return [*noise, *(field.shape for field in portable.spec.values())]


def _axes(shape: tuple[int, ...], batch: Any) -> dict[int, Any]:
    """The axes of an input that may have any size; the sizes of different inputs may be equal by design."""
    any_size = {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(shape, 1) if size < 0}
    return {0: batch, **any_size}


def _write_graph(graph: _Outputs, names: list[str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    try:
        with _quiet():
            torch.onnx.export(
                graph,
                graph.portable.inputs(2),
                path,
                input_names=names,
                output_names=graph.names,
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=(tuple(_axes(shape, batch) for shape in _shapes(graph.portable)),),
                external_data=weights > _ONE_FILE,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            "this student cannot be written as a graph of ONNX",
            got=str(error.__cause__ or error).strip().splitlines()[0],
            expected="a network and a first step that do not branch on the values of a batch",
            fix="export it with --to safetensors",
        ) from error


def _difference(runtime: Any, graph: _Outputs, names: list[str], path: Path) -> float:
    """The largest difference between graph and student, at batch sizes that the graph was not made at.

    Samples in units of the data count by the half range of their column, bytes by that of a byte, one of them
    left aside for a value on the border of two.

    Raises:
        UserError: It is too large, or the graph does not run at another size.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = relative = 0.0
    for n in _BATCHES:
        inputs = graph.portable.inputs(n, seed=n)
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        try:
            found = [torch.from_numpy(value) for value in session.run(graph.names, fed)]
        except Exception as error:  # of onnxruntime, whose errors have no class in common
            raise UserError(
                "this student cannot be written as a graph of ONNX that takes any batch",
                got=cause(error),
                expected="a network whose code does not fix the size of a batch, as len(x) does",
                fix="use x.shape[0] in it, or export it with --to safetensors",
            ) from error
        expected = graph.portable.expected(inputs)
        far = float((found[0] - expected).abs().max())
        worst, size = max(worst, far), max(1.0, float(expected.abs().max()))
        relative = max(relative, far / size)
        if graph.scaling is not None:
            relative = max(relative, _in_units(graph.scaling, found[1], expected) / size)
    if not relative <= TOLERANCE:
        raise UserError(
            "the graph does not reproduce the student's samples, so it was not saved",
            got=f"a relative difference of {relative:.2g} in onnxruntime",
            expected=f"at most {TOLERANCE:g}",
            fix="export it with --to safetensors; another version of onnxruntime may work",
        )
    return worst


def _in_units(scaling: Scaling, found: Tensor, expected: Tensor) -> float:
    """How far samples in units of the data are from those that they should be, in units of model space."""
    right = scaling.in_units(expected)
    if found.shape != right.shape or found.dtype != right.dtype:
        return float("inf")
    if scaling.kind == "image":
        return max(0.0, (float((found.int() - right.int()).abs().max()) - 1) / 127.5)
    half = torch.tensor(scaling.half, dtype=torch.float64)
    rounding = 2 * torch.finfo(right.dtype).eps * right.abs().double()  # of values far from 0
    return float((((found - right).abs().double() - rounding).clamp(min=0) / half).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the messages of torch's exporter about itself and optional packages."""
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


def _usage(portable: Portable, output: str) -> str:
    feeds = []
    for name, shape in zip(portable.names, _shapes(portable), strict=True):
        size = ", ".join(["16", *(str(max(n, 1)) for n in shape)]) + ("" if shape else ",")
        any_size = "; 1 may be any size" if -1 in shape else ""
        field = dict(zip(portable.names[portable.draws :], portable.spec.values(), strict=True)).get(name)
        if field is None:
            feeds.append(f'    "{name}": rng.standard_normal(({size})).astype("float32"),')
        elif field.classes:
            feeds.append(f'    "{name}": rng.integers({field.classes}, size=16),')
        else:
            kind = "float32" if field.dtype.is_floating_point else str(field.dtype).removeprefix("torch.")
            feeds.append(f'    "{name}": np.zeros(({size}), "{kind}"),  # your conditions{any_size}')
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
            f'samples = session.run(["{output}"], inputs)[0]',
        ]
    )
