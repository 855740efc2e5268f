"""The options of `distmatch evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from distmatch.training.pipeline_options import PipelineOptions

if TYPE_CHECKING:
    from distmatch.metrics import Features

    Found = tuple[dict[str, dict[str, Any]], Features, str, list[str]]
    """Metrics by what was measured; the feature space, the reference, remarks."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `distmatch evaluate`."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """A sample file or folder of images, or a run folder (whose metrics.json is then written)."""
    against: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")] = ""
    """The reference: real data, or samples of a teacher. The same as --data."""
    divergences: str = ""
    """Divergences and discrepancies D(p, q) instead of metrics: all, or names with commas
    (kl,gjs:0.3,renyi:2,mmd). The reference is p, WHAT is q."""
    data: str = ""
    """The reference; empty: the real data of the run."""
    prompts: str = ""
    """For a student of prompts: those to measure on, as for distill; empty: those of the run. Without
    images the reference is samples of the teacher from other noise."""
    teacher: str = ""
    """For a student's run: the teacher to compare with; empty: --base, or the one it was distilled from."""
    base: str = ""
    """For a student of adapters (--train lora) or of a pipeline: its base, the teacher, if it was moved."""
    network: str = ""
    """For a model of a network of your own: MODULE:NAME of its class, of a function that makes it, or of the
    denoiser, as Python would import it from here."""
    features: str = "auto"
    """classifier, pixels, a pretrained network for images (efficientnet-lite0; inception, clip, dinov2 with
    --feature-weights), several of them, or auto: classifier where there are labels; pixels with
    --divergences."""
    feature_weights: str = ""
    """File of the weights of inception, clip or dinov2 (docs/metrics.md says which); of several networks
    NAME=FILE with commas."""
    n: int | None = None
    """Samples per block, the same for all; unset: half the data, at most 5000; of runs on prompts 100. With
    --divergences the limit per set, at most 20,000."""
    solver: str = "heun"
    """Solver for the teacher; docs/solvers.md lists the names."""
    steps: int = 18
    """Steps of the teacher's solver; 18 of Heun's are 35 network calls."""
    grid: Literal["auto", "karras", "log", "uniform", "power", "log-snr", "time"] = "auto"
    """Grid of noise levels for the teacher; auto: that of its own sampler, karras for most."""
    guidance: float = 1.0
    """Guidance scale of the teacher; 1 is none, or that of the run where its samples are the reference."""
    batch: int = 1024
    """Samples per batch."""
    seed: int = 0
    """Seed of initial noise, labels and blocks."""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print one JSON object on stdout."""
