"""Divergences estimated from samples, each with a standard error, and a warning where it is not reliable.

================================  =====================================  =====================================
estimator                         needs                                  gives
================================  =====================================  =====================================
:func:`monte_carlo`               log p and log q at samples of q        any f-divergence
:func:`monte_carlo_two_sided`     both, at samples of q and of p         any f-divergence, singular parts too
:func:`renyi_monte_carlo`         log p and log q at samples of q        Renyi
:func:`kl_estimate`               log p and log q at samples of q        KL(q || p) by k1, k2 or k3
:func:`kl_neighbors`              samples of p and q, few dimensions     KL(p || q)
:class:`VariationalEstimator`     samples of p and q                     a lower bound of any f-divergence
:func:`classifier_estimates`      samples of p and q                     lower bounds of many at once
================================  =====================================  =====================================

The bounds can also be taken from a critic or classifier of your own: :func:`f_gan_bound`,
:func:`classifier_bound`, :func:`nwj_bound`, :func:`donsker_varadhan_bound`, :func:`chi_square_bound`.
"""

from distmatch.divergences.estimators.bounds import (
    chi_square_bound,
    classifier_bound,
    donsker_varadhan_bound,
    f_gan_bound,
    nwj_bound,
)
from distmatch.divergences.estimators.consistent import Consistent, consistent
from distmatch.divergences.estimators.critic import Critic, Training
from distmatch.divergences.estimators.kl_terms import kl_estimate, kl_terms
from distmatch.divergences.estimators.monte_carlo import (
    monte_carlo,
    monte_carlo_two_sided,
    renyi_monte_carlo,
)
from distmatch.divergences.estimators.neighbors import kl_neighbors
from distmatch.divergences.estimators.results import LowerBound, WeightedEstimate, effective_number
from distmatch.divergences.estimators.variational import BOUNDS, VariationalEstimator, classifier_estimates

__all__ = [
    "BOUNDS",
    "Consistent",
    "Critic",
    "LowerBound",
    "Training",
    "VariationalEstimator",
    "WeightedEstimate",
    "chi_square_bound",
    "classifier_bound",
    "classifier_estimates",
    "consistent",
    "donsker_varadhan_bound",
    "effective_number",
    "f_gan_bound",
    "kl_estimate",
    "kl_neighbors",
    "kl_terms",
    "monte_carlo",
    "monte_carlo_two_sided",
    "nwj_bound",
    "renyi_monte_carlo",
]
