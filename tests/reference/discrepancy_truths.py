"""Closed forms for normal distributions that the tests and studies of discrepancies compare with."""

import math

import torch

from tests.helpers.draws import normal


def gaussian_mmd(mean_gap, var_x, var_y, s):
    """MMD^2 of N(0, var_x I) and N(gap, var_y I) under the Gaussian kernel of bandwidth s."""
    d, gap2 = len(mean_gap), float((mean_gap**2).sum())

    def mean_kernel(v, g2):
        return (1 + v / s**2) ** (-d / 2) * math.exp(-g2 / (2 * (v + s**2)))

    return mean_kernel(2 * var_x, 0) + mean_kernel(2 * var_y, 0) - 2 * mean_kernel(var_x + var_y, gap2)


def mean_distance(gap, variance):
    """E|Z| for Z ~ N(gap, variance) in one dimension."""
    s = math.sqrt(variance)
    return s * math.sqrt(2 / math.pi) * math.exp(-(gap**2) / (2 * variance)) + gap * math.erf(
        gap / (s * math.sqrt(2))
    )


def energy_1d(gap, var_x, var_y):
    return 2 * mean_distance(gap, var_x + var_y) - mean_distance(0, 2 * var_x) - mean_distance(0, 2 * var_y)


def gaussian_cauchy_schwarz(gap, var_x, var_y, h):
    """Of N(0, var_x I) and N(gap, var_y I), both blurred by h."""
    a, b, d = var_x + h**2, var_y + h**2, len(gap)
    return d * math.log((a + b) / (2 * math.sqrt(a * b))) + float((gap**2).sum()) / (a + b)


def normal_distance_covariance(rho):
    """dCov^2 of a bivariate standard normal with correlation rho (Szekely et al. 2007, theorem 7)."""
    inner = (
        rho * math.asin(rho) + math.sqrt(1 - rho**2) - rho * math.asin(rho / 2) - math.sqrt(4 - rho**2) + 1
    )
    return 4 / math.pi * inner


def shifted_stein(shift, s):
    """Squared KSD of N(shift, I) samples to N(0, I), Gaussian kernel: s_p - s_q is the shift itself."""
    d = len(shift)
    return float((shift**2).sum()) * (1 + 2 / s**2) ** (-d / 2)


def covered(estimates, truth):
    """The share of nominal 95 % intervals that hold the truth."""
    z = torch.tensor([(e.value - truth) / e.stderr for e in estimates])
    return float((z.abs() < 1.96).double().mean())


def samples(n, d, seed, shift=0.0, scale=1.0):
    """n draws of N(shift, scale^2 I)."""
    return normal(n, d, seed=seed) * scale + shift
