"""PFGM++ (Xu et al. 2023): diffusion with D extra dimensions, of which only the radius r is used.

With r = sigma sqrt(D), a sample is noised to ``x0 + sigma n``, n a multivariate Student-t of D degrees of
freedom: a unit normal over ``sqrt(chi2_D / D)``. Training, preconditioning, levels and the ordinary
differential equation are those of Gaussian noise; noise and prior are not. D to infinity is Gaussian noise.

``(D(x) - x) / sigma^2`` is not the gradient of a log-density for finite D, so nothing that needs a score
takes such a teacher (:func:`~distmatch.diffusion.denoiser.has_score`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.base.seeds import generator as make_generator
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand

_SKIPPED = 2**20  # samples at a time whose chi2 are drawn for those after them


def student_t(noise: Tensor, dims: float, generator: torch.Generator) -> Tensor:
    """Turns unit normal noise into the noise of PFGM++: ``noise sqrt(D / chi2_D)``, one chi2 a sample.

    Its variance is D / (D - 2) a dimension, infinite for D of 2 or less.

    Args:
        noise: Unit normals (B, *shape).
        dims: D, positive; it need not be whole.
        generator: On the device of ``noise``.

    Raises:
        UserError: D is not positive and finite.
    """
    check_dims(dims)
    half = torch.full((len(noise),), dims / 2, dtype=torch.float64, device=noise.device)
    # A unit gamma of shape D/2 is half a chi2 of D; it is 0 in float64 only for D far below 1.
    gamma = torch._standard_gamma(half, generator=generator)
    return noise * expand((half / gamma.clamp_min(1e-300)).sqrt(), noise).to(noise.dtype)


def check_dims(dims: float) -> None:
    """Refuses extra dimensions that are not positive and finite.

    Raises:
        UserError: They are not.
    """
    check_number(
        "the number of extra dimensions of PFGM++",
        dims,
        "(0, inf)",
        fix="it is usually 128 or 2048; for Gaussian noise use a teacher without them",
    )


def start_noise(denoiser: Denoiser, latents: Tensor, seed: int, *, first: int = 0) -> Tensor:
    """What a sampler scales by its first level: the latents, or Student-t noise made of them.

    Args:
        denoiser: The teacher, or a wrapper that has it as ``inner``.
        latents: Unit normals on the CPU, (n, *shape).
        seed: Seed of the chi2 of the samples; that of sample i does not depend on n.
        first: Number of the first sample; the numbers of those before it are drawn too, one each.
    """
    dims = pfgm_dims(denoiser)
    if dims == 0:
        return latents
    stream = make_generator(seed, "pfgm start")
    for begin in range(0, first, _SKIPPED):
        student_t(latents.new_empty(min(_SKIPPED, first - begin), 1), dims, stream)
    return student_t(latents, dims, stream)


def pfgm_dims(denoiser: Denoiser) -> float:
    """The extra dimensions D of a teacher, 0 for Gaussian noise; wrappers are looked through."""
    inner: object | None = denoiser
    while inner is not None:
        dims = getattr(inner, "pfgm_dims", None)
        if dims is not None:
            return float(dims)
        inner = getattr(inner, "inner", None)
    return 0.0


class StudentTTeacher(nn.Module):
    """The exact PFGM++ denoiser of a finite data set: weights ``(r^2 + |x - y_i|^2)^(-(N + D) / 2)``.

    Args:
        points: The data (M, N), equally likely.
        dims: D.
        sigma_min: Smallest level samplers should go to.
        sigma_max: Largest level; samplers start there.

    Raises:
        UserError: The data are not vectors, or D is not positive.
    """

    points: Tensor
    gaussian_kernel = False
    num_classes = 0

    def __init__(
        self, points: Tensor, dims: float, *, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        super().__init__()
        check_dims(dims)
        if points.ndim != 2 or len(points) == 0:
            raise UserError("the data must be vectors", got=tuple(points.shape), expected="(M, N)")
        self.register_buffer("points", points.double())
        self.pfgm_dims = float(dims)
        self.shape = tuple(points.shape[1:])
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.sigma_data = float((points.double() - points.double().mean(0)).square().mean().sqrt())

    def _log_kernels(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Log kernels without their constants (B, M), r^2 + |x - y|^2 (B, M), and r^2 (B, 1)."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        r2 = self.pfgm_dims * level[:, None] ** 2
        distance = r2 + (x[:, None] - self.points.to(x.dtype)[None]).square().sum(-1)
        # As log1p, so that a large D does not cost the digits that tell the points apart.
        power = (self.shape[0] + self.pfgm_dims) / 2
        return -power * torch.log1p((distance - r2) / r2), distance, r2

    def forward(self, x: Tensor, sigma: Tensor | float, conditioning: ConditioningLike = None) -> Tensor:
        """E[x0 | x], (B, N), for ``x`` (B, N) at levels ``sigma`` (B,) or one for all."""
        return self._log_kernels(x, sigma)[0].softmax(1) @ self.points.to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Log-density in nats of the noised data, (B,)."""
        log_kernels, _, r2 = self._log_kernels(x, sigma)
        n, d = self.shape[0], self.pfgm_dims
        constant = math.lgamma((n + d) / 2) - math.lgamma(d / 2) - n / 2 * math.log(math.pi)
        total = torch.logsumexp(log_kernels, dim=1) - math.log(len(self.points))
        return total + constant - n / 2 * r2[:, 0].log()

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The gradient of :meth:`log_prob`, ``-(N + D) E[(x - y) / (r^2 + |x - y|^2) | x]``, (B, N)."""
        log_kernels, distance, _ = self._log_kernels(x, sigma)
        share = log_kernels.softmax(1) / distance
        pull = share.sum(1, keepdim=True) * x - share @ self.points.to(x.dtype)
        return -(self.shape[0] + self.pfgm_dims) * pull
