"""Log-densities at the largest noise level, for likelihoods and density estimates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, labels_of
from distmatch.diffusion.denoiser import Denoiser, has_score
from distmatch.diffusion.geometry.jacobian import denoiser_jacobian

Prior = Callable[[Tensor, ConditioningLike], Tensor]
PRIORS = ("data", "sampler", "moments")


def gaussian_prior(variance: float, mean: Tensor | float = 0.0) -> Prior:
    """N(mean, variance I) as a function of positions (B, *shape) and labels, in nats (B,).

    Args:
        variance: Above 0.
        mean: A number, or (*shape).
    """

    def density(y: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        residual = (y - mean).flatten(1)
        return -0.5 * (
            residual.square().sum(1) / variance + residual.shape[1] * math.log(2 * math.pi * variance)
        )

    return density


def moment_prior(
    denoiser: Denoiser, sigma: float, *, dtype: torch.dtype = torch.float64, chunk: int = 16
) -> Prior:
    """The Gaussian whose score is the model's score at ``sigma``, linearized about its zero.

    For Gaussian data it is exact; else its error falls as the data's third cumulant over sigma^3.

    Args:
        denoiser: The model.
        sigma: A level well above the spread of the data.
        dtype: In which the model computes.
        chunk: VJPs at a time.

    Returns:
        A function of positions (B, *shape) and labels; it needs D VJPs for each distinct label.
    """

    def density(y: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        labels = labels_of(conditioning)
        if labels is None:
            which = torch.zeros(len(y), dtype=torch.int64, device=y.device)
            n = 1
        else:
            labels, which = labels.unique(return_inverse=True)
            n = len(labels)
        level = torch.full((n,), sigma, dtype=dtype, device=y.device)
        mean = torch.zeros(n, *y.shape[1:], dtype=dtype, device=y.device)
        with torch.no_grad():
            for _ in range(3):  # D(mean) = mean holds for the mean; each pass gains (sigma_data / sigma)^2
                mean = denoiser(mean, level, labels)
        jacobian = denoiser_jacobian(denoiser, mean, level, labels, chunk=chunk)[1].double()
        eye = torch.eye(jacobian.shape[-1], dtype=torch.float64, device=y.device)
        precision = (eye - (jacobian + jacobian.mT) / 2) / sigma**2
        factor, failed = torch.linalg.cholesky_ex(precision)
        if bool(failed.any()):
            raise UserError(
                'the "moments" prior does not exist at this noise level',
                got=f"sigma_max {sigma:.3g}, where the model's score is not that of a Gaussian",
                fix='raise sigma_max, or use prior="data"',
            )
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        whitened = torch.einsum("bij,bi->bj", factor[which], (y.double() - mean[which].double()).flatten(1))
        dim = whitened.shape[1]
        return 0.5 * (log_det[which] - dim * math.log(2 * math.pi)) - 0.5 * whitened.square().sum(1)

    return density


def prior_density(
    prior: str | Prior, denoiser: Denoiser, sigma: float, *, dtype: torch.dtype, chunk: int = 16
) -> Prior:
    """Looks a prior up: ``"data"``, ``"sampler"``, ``"moments"``, or a function, which is kept.

    Raises:
        UserError: An unknown name, or a model whose noise is not Gaussian without a function.
    """
    if callable(prior):
        return prior
    check_name("prior", prior, PRIORS)
    if not has_score(denoiser):
        raise UserError(
            "this teacher's noise is not Gaussian, and neither is its distribution at sigma_max",
            fix="pass its own log-density as prior",
        )
    if prior == "moments":
        return moment_prior(denoiser, sigma, dtype=dtype, chunk=chunk)
    return gaussian_prior(sigma**2 + (denoiser.sigma_data**2 if prior == "data" else 0.0))
