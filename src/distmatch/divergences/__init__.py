"""f-divergences as functions of log r = log p_teacher - log q_student, in nats with true constants."""

from __future__ import annotations

from distmatch.divergences import closed_forms
from distmatch.divergences.alpha import alpha
from distmatch.divergences.combined import mixture
from distmatch.divergences.core import Divergence
from distmatch.divergences.custom import custom
from distmatch.divergences.discrete import divergence_discrete
from distmatch.divergences.lookup import ALIASES, FAMILIES, NAMES, divergence, measure
from distmatch.divergences.quadrature import divergence_1d, divergence_2d
from distmatch.divergences.renyi import Renyi
from distmatch.divergences.skewed import gjs, skew_kl, skew_reverse_kl

__all__ = [
    "ALIASES",
    "FAMILIES",
    "NAMES",
    "Divergence",
    "Renyi",
    "alpha",
    "closed_forms",
    "custom",
    "divergence",
    "divergence_1d",
    "divergence_2d",
    "divergence_discrete",
    "gjs",
    "measure",
    "mixture",
    "skew_kl",
    "skew_reverse_kl",
]
