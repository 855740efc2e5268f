"""A mixture, starts and names of solvers that the tests of solvers share."""

from __future__ import annotations

import torch
from torch import Tensor

from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.04, 0.09])
HIGH, LOW = 10.0, 0.05
START = HIGH * torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)[:, None]
DETERMINISTIC = [
    *("euler", "heun", "ddim", "dpmpp-1", "dpmpp-2m", "tab:2", "rhoab:3", "rhork:kutta3", "rhork:rk4"),
    *("ipndm:3", "hb:0.8", "hb:0.7:2", "hb-2m:0.8", "ghvb:1.8", "ghvb:4.5"),
    *("deis", "unipc", "unipc:3"),
]
STOCHASTIC = [
    *("heun:20", "ddim:0.5", "ddim:1", "dpmpp-sde", "dpmpp-2m-sde", "euler-maruyama", "euler-maruyama:0.5"),
    *("reverse-diffusion", "pc", "pc:0.1:2"),
]


def noise_for(y: Tensor, seed: int = 0) -> SampleNoise:
    return SampleNoise(seed, torch.arange(len(y)), tuple(y.shape[1:]))


class Normal:
    """The exact denoiser of N(0, 1) in two dimensions; notes the dtypes it is called in."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 0, 1.0, 0.002, 80.0

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        self.dtypes |= {x.dtype, sigma.dtype}
        return x / (1 + sigma[:, None] ** 2)
