"""How far apart two samples are without a density ratio: kernels, distances, scores and transport.

A function named ``..._loss`` gives a differentiable tensor; the one without that ending gives an ``Estimate``
with a standard error; one that ends in ``_test`` gives a p-value.
"""

from __future__ import annotations

from distmatch.discrepancies.cauchy_schwarz import (
    cauchy_schwarz,
    cauchy_schwarz_loss,
    conditional_cauchy_schwarz,
    conditional_cauchy_schwarz_loss,
    silverman_bandwidth,
)
from distmatch.discrepancies.distance_covariance import (
    concatenated_distance_covariance,
    distance_covariance,
    distance_covariance_loss,
    distance_covariance_test,
)
from distmatch.discrepancies.energy import energy_distance, energy_distance_loss, energy_test
from distmatch.discrepancies.fisher import (
    denoising_score_matching_loss,
    fisher_divergence,
    hyvarinen,
    score_matching_loss,
    score_of,
)
from distmatch.discrepancies.gaussian_transport import gaussian_sinkhorn
from distmatch.discrepancies.joint_covariance import (
    joint_distance_covariance,
    joint_distance_covariance_loss,
)
from distmatch.discrepancies.kernels import (
    KERNELS,
    Kernel,
    gaussian,
    imq,
    laplace,
    median_bandwidth,
    polynomial,
    rational_quadratic,
)
from distmatch.discrepancies.mmd import mmd, mmd_loss, mmd_test
from distmatch.discrepancies.permutation import TestResult
from distmatch.discrepancies.sinkhorn import SinkhornResult, sinkhorn_divergence
from distmatch.discrepancies.sinkhorn_estimate import sinkhorn_estimate
from distmatch.discrepancies.sliced import (
    MaxSliced,
    max_sliced_wasserstein,
    random_directions,
    sliced_wasserstein,
    sliced_wasserstein_loss,
)
from distmatch.discrepancies.stein import kernel_stein, kernel_stein_loss, kernel_stein_test
from distmatch.discrepancies.wasserstein import wasserstein_1d

__all__ = [
    "KERNELS",
    "Kernel",
    "MaxSliced",
    "SinkhornResult",
    "TestResult",
    "cauchy_schwarz",
    "cauchy_schwarz_loss",
    "concatenated_distance_covariance",
    "conditional_cauchy_schwarz",
    "conditional_cauchy_schwarz_loss",
    "denoising_score_matching_loss",
    "distance_covariance",
    "distance_covariance_loss",
    "distance_covariance_test",
    "energy_distance",
    "energy_distance_loss",
    "energy_test",
    "fisher_divergence",
    "gaussian",
    "gaussian_sinkhorn",
    "hyvarinen",
    "imq",
    "joint_distance_covariance",
    "joint_distance_covariance_loss",
    "kernel_stein",
    "kernel_stein_loss",
    "kernel_stein_test",
    "laplace",
    "max_sliced_wasserstein",
    "median_bandwidth",
    "mmd",
    "mmd_loss",
    "mmd_test",
    "polynomial",
    "random_directions",
    "rational_quadratic",
    "score_matching_loss",
    "score_of",
    "silverman_bandwidth",
    "sinkhorn_divergence",
    "sinkhorn_estimate",
    "sliced_wasserstein",
    "sliced_wasserstein_loss",
    "wasserstein_1d",
]
