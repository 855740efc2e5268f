"""distmatch: one-step generators from diffusion models, by matching distributions under a chosen divergence.

The names below load what they need on first use, so that importing the package takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distmatch.base.version import __version__

if TYPE_CHECKING:
    from distmatch import divergences, losses, methods, metrics
    from distmatch.api import compare, distill, evaluate, load_teacher, train
    from distmatch.base.errors import UserError
    from distmatch.base.estimate import Estimate
    from distmatch.data import Dataset, load_data
    from distmatch.diffusion import guidance, paths, solvers
    from distmatch.diffusion.conditioning import Conditioning
    from distmatch.diffusion.mixture import GaussianMixture
    from distmatch.diffusion.own_network import as_denoiser
    from distmatch.divergences import Divergence, divergence
    from distmatch.methods.hybrid import hybrid_sample
    from distmatch.methods.student import Student
    from distmatch.training.fit import fit

_MODULES = {
    "divergences": "distmatch.divergences",
    "guidance": "distmatch.diffusion.guidance",
    "losses": "distmatch.losses",
    "methods": "distmatch.methods",
    "metrics": "distmatch.metrics",
    "paths": "distmatch.diffusion.paths",
    "solvers": "distmatch.diffusion.solvers",
}

_HOME = {
    "Conditioning": "distmatch.diffusion.conditioning",
    "Dataset": "distmatch.data",
    "Divergence": "distmatch.divergences",
    "Estimate": "distmatch.base.estimate",
    "GaussianMixture": "distmatch.diffusion.mixture",
    "Student": "distmatch.methods.student",
    "UserError": "distmatch.base.errors",
    "as_denoiser": "distmatch.diffusion.own_network",
    "compare": "distmatch.api",
    "distill": "distmatch.api",
    "divergence": "distmatch.divergences",
    "evaluate": "distmatch.api",
    "fit": "distmatch.training.fit",
    "hybrid_sample": "distmatch.methods.hybrid",
    "load_data": "distmatch.data",
    "load_teacher": "distmatch.api",
    "train": "distmatch.api",
}

__all__ = [
    "Conditioning",
    "Dataset",
    "Divergence",
    "Estimate",
    "GaussianMixture",
    "Student",
    "UserError",
    "__version__",
    "as_denoiser",
    "compare",
    "distill",
    "divergence",
    "divergences",
    "evaluate",
    "fit",
    "guidance",
    "hybrid_sample",
    "load_data",
    "load_teacher",
    "losses",
    "methods",
    "metrics",
    "paths",
    "solvers",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'distmatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
