"""Noise paths x_t = alpha(t) x0 + sigma(t) eps: from one time to everything that follows from it.

Time grows from data to noise. All arithmetic is float64. A denoiser depends on the noise-to-signal ratio
``rho = sigma / alpha`` alone, so a path matters only where time itself does: the network's time, grids in
time, samples at an intermediate time.
"""

from distmatch.diffusion.paths.core import NoisePath, check_prior
from distmatch.diffusion.paths.custom import path_of
from distmatch.diffusion.paths.discrete import DiscretePath, betas, discrete_path
from distmatch.diffusion.paths.kinetic import kinetic_path, kinetic_path_of
from distmatch.diffusion.paths.named import (
    PATHS,
    condot,
    cosine,
    edm,
    noise_path,
    sub_vp,
    trigflow,
    ve,
    vp,
)
from distmatch.diffusion.paths.on_path import OnPath

__all__ = [
    "PATHS",
    "DiscretePath",
    "NoisePath",
    "OnPath",
    "betas",
    "check_prior",
    "condot",
    "cosine",
    "discrete_path",
    "edm",
    "kinetic_path",
    "kinetic_path_of",
    "noise_path",
    "path_of",
    "sub_vp",
    "trigflow",
    "ve",
    "vp",
]
