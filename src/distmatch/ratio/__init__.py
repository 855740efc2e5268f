"""Density ratios: fitted to two samples, tested, and, for distillation, normalized."""

from distmatch.ratio.density_ratio import METHODS, DensityRatio, fit_ratio
from distmatch.ratio.diagnostics import MassTests, mass_tests
from distmatch.ratio.values import divergence_from_ratio

__all__ = ["METHODS", "DensityRatio", "MassTests", "divergence_from_ratio", "fit_ratio", "mass_tests"]
