"""Discrete diffusion: absorbing processes over tokens, any-order likelihoods, marginalization models."""

from distmatch.discrete.likelihood import exact_bound, exact_log_prob, nll_bound, sequence_bound
from distmatch.discrete.losses import LOSSES, discrete_loss
from distmatch.discrete.marginals import consistency_loss, gibbs_block, inequality_violation, reinforce_loss
from distmatch.discrete.network import MarginalNet, TokenNet, TokenNetConfig
from distmatch.discrete.orders import forward_turns, order_log_prob, random_turns
from distmatch.discrete.sampling import SAMPLERS, DiscreteSamples, sample_tokens
from distmatch.discrete.saved import load_discrete, save_discrete
from distmatch.discrete.schedules import SCHEDULES, MaskSchedule, mask_schedule
from distmatch.discrete.table import JointTable
from distmatch.discrete.text import Alphabet, continue_text, fill_text, text_crops
from distmatch.discrete.tokens import Conditionals, Marginals
from distmatch.discrete.training import (
    ConditionalTraining,
    EnergyTraining,
    MarginalTraining,
    TokenState,
    TokenTrainingConfig,
)

__all__ = [
    "LOSSES",
    "SAMPLERS",
    "SCHEDULES",
    "Alphabet",
    "ConditionalTraining",
    "Conditionals",
    "DiscreteSamples",
    "EnergyTraining",
    "JointTable",
    "MarginalNet",
    "MarginalTraining",
    "Marginals",
    "MaskSchedule",
    "TokenNet",
    "TokenNetConfig",
    "TokenState",
    "TokenTrainingConfig",
    "consistency_loss",
    "continue_text",
    "discrete_loss",
    "exact_bound",
    "exact_log_prob",
    "fill_text",
    "forward_turns",
    "gibbs_block",
    "inequality_violation",
    "load_discrete",
    "mask_schedule",
    "nll_bound",
    "order_log_prob",
    "random_turns",
    "reinforce_loss",
    "sample_tokens",
    "save_discrete",
    "sequence_bound",
    "text_crops",
]
