"""The model card: the README.md of a model, with its description, its evaluation, and its usage."""

from __future__ import annotations

import json
import math
import platform
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distmatch.base.files import atomic_write
from distmatch.base.version import __version__
from distmatch.nets.saved import CARD
from distmatch.nets.shared import parameter_counts

LICENSE = "unknown: that of the teacher and the data"
"""The text of a card without a licence."""

_BEGIN, _END = "<!-- metrics -->", "<!-- end of metrics -->"
_UNMEASURED = "Not measured. `distmatch evaluate` on the run folder fills this in."
OF = "of"
"""Entry of the reference in ``metrics.json``: what it is where it is no real data."""
_DIRECTIONS = (
    "Lower is better for fd, kid, frame_fd, kl, reverse_kl, js and prompt_energy; density, vendi, motion, "
    "prompt_diversity and prompt_vendi are best at the floor; higher is better for the others. The floor "
    "compares real data with real data. Errors are one standard error; that of a difference assumes "
    "independent sides."
)

GUIDANCE = {
    "guidance_interval": "at noise levels from {:g} to {:g}, in units of sigma_data",
    "guidance_rescale": "rescaled by {:g}",
    "negative_prompt": "away from {!r}",
    "guidance_range": "received as an input, from {:g} to {:g}",
}
"""What is saved with a student about the guidance of its teacher besides the scale, where it was chosen."""


def model_card(
    about: Mapping[str, Any],
    *,
    shape: tuple[int, ...],
    num_classes: int,
    parameters: int,
    adapters: int = 0,
    usage: str = "",
    library: str = "distmatch",
    metrics: Mapping[str, Any] | None = None,
    network: str = "",
) -> str:
    """The text of a model card: Markdown, headed by the YAML that model hubs read.

    Args:
        about: What is saved with the model: ``kind``, ``levels``, ``method``, ``teacher``, ``data``,
            ``license``, ...; missing entries are omitted from the card.
        shape: Shape of one sample.
        num_classes: Number of classes; 0 when unconditional.
        parameters: Number of parameters of the network, without adapters.
        adapters: Number of parameters of adapters on it.
        usage: Python that loads the model and samples it; by default that of a distmatch model folder.
        library: The package that the model is for.
        metrics: The content of ``metrics.json``.
        network: The class of a network that must be passed for loading; '' where the folder says it all.
    """
    student = about.get("kind") == "student"
    calls = len(about.get("levels", ()))
    if student:
        title = "One-step generator" if calls == 1 else f"Generator with {calls} network calls"
        purpose = (
            f"It generates samples from noise with {_calls(calls)}. It was distilled from a diffusion "
            f"model, its teacher, and reproduces that model's distribution, including its biases and gaps."
        )
    else:
        title = "Diffusion model"
        purpose = "It removes noise step by step, and can be distilled into a generator of one network call."
    facts = _facts(about, shape, num_classes, parameters, adapters)
    parts = [
        _front_matter(about, shape, num_classes, library),
        f"# {title}" + (f": {_cell(str(about['method']))}" if about.get("method") else ""),
        purpose,
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items())]),
        "## What was lost" if student else "## Measured",
        f"{_BEGIN}\n{metrics_section(metrics)}\n{_END}",
        "## Loading and sampling",
        f"```python\n{usage or _usage(about, shape, network)}\n```",
        "## Intended use",
        "Research on fast samplers, and applications that need samples similar to the data. The samples "
        "are not evidence about any real person or thing. They have not been checked for memorized "
        "training data or for harm; check both before you publish samples or build on them.",
        "## Licence",
        _licence(about),
    ]
    return "\n\n".join(parts) + "\n"


def card_of(denoiser: Any, about: Mapping[str, Any], **options: Any) -> str:
    """The card of a denoiser with parameters; ``options`` are those of :func:`model_card`."""
    base, adapters = parameter_counts(denoiser)
    return model_card(
        about,
        shape=tuple(denoiser.shape),
        num_classes=denoiser.num_classes,
        parameters=base,
        adapters=adapters,
        **options,
    )


def refresh_card(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Writes new measurements into the card of a model folder, atomically; what else it says stays.

    Args:
        folder: The model folder. One without a card, or with a card without a place for them, is not changed.
        metrics: The content of ``metrics.json``.
    """
    card = folder / CARD
    if not card.is_file():
        return
    before, begin, rest = card.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        atomic_write(card, f"{before}{_BEGIN}\n{metrics_section(metrics)}\n{_END}{after}")


def metrics_section(metrics: Mapping[str, Any] | None) -> str:
    """The evaluation as a Markdown table of student and teacher, with the difference."""
    if not metrics:
        return _UNMEASURED
    names = [name for name in ("reference", "teacher", "student") if name in metrics]
    names += [name for name in metrics if name not in names]
    compared = {"teacher", "student"} <= metrics.keys()
    titles = ["floor" if name == "reference" else name for name in names]
    titles += ["student - teacher"] if compared else []
    keys = dict.fromkeys(key for name in names for key in metrics[name] if key != OF)
    lines = [f"| metric | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for key in keys:
        cells = [_measured(metrics[name].get(key)) for name in names]
        if compared:
            cells.append(_difference(metrics["student"].get(key), metrics["teacher"].get(key)))
        lines.append(f"| {_cell(str(key))} | {' | '.join(cells)} |")
    of = (metrics.get("reference") or {}).get(OF)
    instead = f" In place of real data: {_cell(str(of))}." if of else ""
    return "\n".join([*lines, "", _DIRECTIONS + instead])


def guidance_in_words(about: Mapping[str, Any]) -> str:
    """How the teacher of a student was guided: the scale, and its entries of :data:`GUIDANCE`."""
    scale = about.get("guidance")
    said = [] if scale is None else ["none" if scale == 1 else f"{scale:g}"]
    for name, words in GUIDANCE.items():
        if (value := about.get(name)) is not None:
            said.append(words.format(*(value if isinstance(value, (list, tuple)) else [value])))
    return ", ".join(said)


def _facts(
    about: Mapping[str, Any], shape: tuple[int, ...], num_classes: int, parameters: int, adapters: int
) -> dict[str, str]:
    """The rows of the first table; unknown ones are omitted."""
    levels, data = about.get("levels", ()), about.get("data") or {}
    names = data.get("class_names") or []
    named = f" ({', '.join(map(str, names))})" if names and len(names) <= 20 else ""
    samples, digest = data.get("samples"), str(data.get("content_hash", ""))
    calls = f"{len(levels)}, at noise level {', '.join(f'{v:g}' for v in levels)}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    source = str(data.get("spec") or data.get("name") or "")
    rows = {
        "kind": about.get("kind", ""),
        "method": about.get("method", ""),
        "divergence": about.get("divergence", ""),
        "network calls": calls if levels else "",
        "between calls": _between(about) if len(levels) > 1 else "",
        **_schedule(about.get("schedule") or {}),
        "teacher": _without_folders(str(about.get("teacher") or "")),
        "teacher against its original": about.get("teacher_conversion", "") or about.get("conversion", ""),
        "guidance of the teacher": guidance_in_words(about),
        "data": _without_folders(source) + (f", {samples:,} samples" if samples else ""),
        "hash of the data": f"sha256 {digest}" if digest else "",
        "classes": f"{num_classes}{named}" if num_classes else "none",
        "one sample": " x ".join(map(str, shape)),
        "parameters": f"{parameters:,}{f' and {adapters:,} in adapters' if adapters else ''}",
        "seed": about.get("seed", ""),
        "licence": about.get("license") or LICENSE,
        "written by": f"distmatch {__version__}, {versions}",
    }
    return {key: str(value) for key, value in rows.items() if value not in ("", None)}


def base_name(schedule: Mapping[str, Any]) -> str:
    """The base of a student of a pipeline: ``owner/name`` on a hub, or the name of a local folder."""
    base = schedule.get("base") or {}
    return str(base.get("name") or Path(str(base.get("path", ""))).name)  # older ones have a path


def _schedule(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a student of a pipeline: its steps in the terms of the pipeline."""
    if not schedule:
        return {}
    shift, null, base = schedule.get("shift"), schedule.get("null"), schedule.get("base") or {}
    start, name = schedule.get("start", 1.0), base_name(schedule)
    return {
        "times of the calls": ", ".join(f"{t:.6g}" for t in schedule["times"])
        + f" on the path {schedule['path']}",
        "prediction": schedule["prediction"],
        "shift of the teacher": "" if shift is None else f"{shift:.4g}",
        "unconditional prompt": "" if null is None else json.dumps(null),
        "pipeline": schedule["pipeline"],
        "scheduler": schedule.get("scheduler", ""),
        "first noise": "" if start == 1 else f"{start:.4g} times the pipeline's",
        "base": f"{name} (a local folder)" if name and "/" not in name else name,
        "hash of the base": f"sha256 {base['sha256']}" if base.get("sha256") else "",
        "dtype of the base": base.get("dtype") or "",
    }


def _front_matter(about: Mapping[str, Any], shape: tuple[int, ...], num_classes: int, library: str) -> str:
    """The YAML between two rules; JSON strings are YAML strings."""
    licence = str(about.get("license") or "unknown")
    known = re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence)
    lines = [f"license: {licence}"] if known else ["license: other", f"license_name: {json.dumps(licence)}"]
    lines.append(f"library_name: {library}")
    decoded = (about.get("schedule") or {}).get("decoded")
    if decoded:
        lines.append(f"pipeline_tag: text-to-{'image' if len(decoded) == 3 else 'video'}")
    elif len(shape) == 3 and not num_classes:
        lines.append("pipeline_tag: unconditional-image-generation")
    if base := base_name(about.get("schedule") or {}):
        local = "" if "/" in base else "  # the name of a local folder"
        lines.append(f"base_model: {json.dumps(_hub_name(base))}{local}")
    elif base := _hub_name(str(about.get("teacher") or "")):
        lines.append(f"base_model: {json.dumps(base)}")
    data = about.get("data") or {}
    if source := _hub_name(str(data.get("spec") or data.get("name") or "")):
        lines += ["datasets:", f"- {json.dumps(source)}"]
    tags = ["diffusion", *(["distillation"] if about.get("kind") == "student" else [])]
    if len(about.get("levels", ())) == 1:
        tags.append("one-step")
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _hub_name(source: str) -> str:
    """``owner/name`` or ``name`` as it is, of any other path its last part: what hubs accept as an id."""
    name = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else Path(source.rstrip("/\\")).name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") if "/" not in name else name


def _without_folders(source: str) -> str:
    """A name or relative path as it is, of an absolute one its last part: a card is published."""
    return Path(source).name if source.startswith(("/", "~")) else source


def _licence(about: Mapping[str, Any]) -> str:
    given = about.get("license")
    if given:
        return f"{_cell(str(given))}. Given by the author of this model; distmatch did not check it."
    return (
        f"{LICENSE[0].upper()}{LICENSE[1:]}. A student is derived from its teacher's weights or "
        f"predictions: check the terms of both before you share it."
    )


_PROMPTS = """import distmatch as dm

# The pipeline of its teacher is loaded from where it was; pass base="its/folder" if it has moved.
student = dm.Student.from_pretrained("this/folder")
prompts = student.denoiser.prompt_encoder.encode(["a prompt"])
images = student.sample(1, conditioning=prompts)  # in [-1, 1]"""


def _usage(about: Mapping[str, Any], shape: tuple[int, ...], network: str) -> str:
    # The name of a class is a Python identifier, behind a prefix of modules, which is left to the reader.
    name = network.rpartition(":")[2].rpartition(".")[2]
    place = f'"this/folder", network={name}' if name.isidentifier() else '"this/folder"'
    if about.get("kind") != "student":
        return f"import distmatch as dm\n\nteacher = dm.load_teacher({place})  # teacher(x, sigma)"
    if about.get("schedule"):
        return _PROMPTS
    unit = {3: "images in [-1, 1]", 4: "video in [-1, 1]"}.get(len(shape), "scaled as the model was trained")
    lines = [
        "import distmatch as dm\n",
        f"student = dm.Student.from_pretrained({place})",
        f"x = student.sample(16, seed=0)  # {unit}",
    ]
    if "scaling" in (about.get("data") or {}):
        lines.append("samples = student.export(x)  # in the units of the data")
    return "\n".join(lines)


def _calls(count: int) -> str:
    return "one network call" if count == 1 else f"{count} network calls"


# What Markdown or HTML would take for more than text.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|$]")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def _cell(text: str) -> str:
    """Text of any origin as one cell that shows it and nothing else.

    Control characters, and those that turn the direction of writing, become their number.
    """
    unseen = ("Cc", "Cf", "Cs", "Zl", "Zp")
    plain = text.replace("\n", " ").replace("\t", " ")
    shown = "".join(f"U+{ord(c):04X}" if unicodedata.category(c) in unseen else c for c in plain)
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), shown)


def _measured(value: Any) -> str:
    """One cell: an estimate of ``metrics.json``, or a plain number."""
    if not isinstance(value, Mapping):
        return "-" if value is None else f"{value:.4g}"
    if value.get("value") is None:
        return "-"
    error = value.get("stderr")
    return f"{value['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _difference(student: Any, teacher: Any) -> str:
    """Student minus teacher, where both are estimates with a value."""
    if not (isinstance(student, Mapping) and isinstance(teacher, Mapping)):
        return "-"
    sides = (student, teacher)
    if any(side.get("value") is None for side in sides):
        return "-"
    error = ""
    if all(side.get("stderr") is not None for side in sides):
        error = f" ± {math.hypot(student['stderr'], teacher['stderr']):.2g}"
    return f"{student['value'] - teacher['value']:+.4g}{error}"


def _between(about: Mapping[str, Any]) -> str:
    chain = str(about.get("chain", "stochastic"))
    return f"{chain}, gamma {about['gamma']:g}" if "gamma" in about else chain
