"""Every objective as a function of tensors, for a training loop of your own; our methods call the same ones.

Throughout: x_t = x0 + sigma eps; D(x_t, sigma) is a denoiser's prediction of x0; p is the teacher's
distribution and q the generator's; tensors of samples are (B, ...), of levels and weights (B,). A loss is
that of each sample, (B,), unless stated otherwise: take its mean. ``docs/losses.md`` has complete loops.
"""

from distmatch.losses.adversarial import (
    adaptive_weight,
    adversarial_discriminator_loss,
    adversarial_generator_loss,
    approximate_r1,
)
from distmatch.losses.consistency import (
    CTM_CELL,
    consistency_loss,
    ctm_levels,
    ect_lower_level,
    pseudo_huber,
    pseudo_huber_scale,
)
from distmatch.losses.denoising import (
    denoising_loss,
    edm_weight,
    min_snr_weight,
    noisy_mean,
    target_weight,
    uncertainty_loss,
)
from distmatch.losses.fisher import log_ratio_slope, sid_loss, sim_loss, uni_instruct_loss, weight_derivatives
from distmatch.losses.kernel import imm_loss, imm_lower_level, imm_weight, mmd_with_gradient
from distmatch.losses.matching import (
    difference_weight,
    moment_matching_loss,
    pair_regression_loss,
    posterior_noise,
    score_difference,
)
from distmatch.losses.tangents import (
    flow_direction,
    flow_speed,
    mean_flow_error,
    mean_flow_loss,
    scm_loss,
    scm_tangent,
    trigflow_speed,
)

__all__ = [
    "CTM_CELL",
    "adaptive_weight",
    "adversarial_discriminator_loss",
    "adversarial_generator_loss",
    "approximate_r1",
    "consistency_loss",
    "ctm_levels",
    "denoising_loss",
    "difference_weight",
    "ect_lower_level",
    "edm_weight",
    "flow_direction",
    "flow_speed",
    "imm_loss",
    "imm_lower_level",
    "imm_weight",
    "log_ratio_slope",
    "mean_flow_error",
    "mean_flow_loss",
    "min_snr_weight",
    "mmd_with_gradient",
    "moment_matching_loss",
    "noisy_mean",
    "pair_regression_loss",
    "posterior_noise",
    "pseudo_huber",
    "pseudo_huber_scale",
    "scm_loss",
    "scm_tangent",
    "score_difference",
    "sid_loss",
    "sim_loss",
    "target_weight",
    "trigflow_speed",
    "uncertainty_loss",
    "uni_instruct_loss",
    "weight_derivatives",
]
