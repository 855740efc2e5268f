"""From a teacher's options to its loss: what the network predicts, at which levels, with which weight."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.noise import LogNormal
from distmatch.diffusion.paths.core import NoisePath, check_prior
from distmatch.diffusion.paths.levels import PathLevels
from distmatch.diffusion.paths.specs import parse_path
from distmatch.losses import denoising_loss, edm_weight, min_snr_weight, noisy_mean, target_weight
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.path_denoiser import PathDenoiser
from distmatch.training.options import TeacherConfig

_USUAL = {"edm": "f", "trigflow": "f", "cosine": "v"}
_FLOWS = ("condot", "rectified-flow", "flow-matching", "kinetic-optimal")


@dataclass(frozen=True)
class Objective:
    """The settled choices behind a teacher's loss.

    Attributes:
        path: The noise path.
        prediction: "f" (EDM's network), or one of the predictions on the path.
        levels: Distribution of the noise levels.
        weighting: "edm", "target", "min-snr" or "x0".
        gamma: That of min-SNR.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest level of the teacher.
        sigma_max: Largest level of the teacher.
        pfgm_dims: Extra dimensions of PFGM++; 0 for Gaussian noise.
    """

    path: NoisePath
    prediction: str
    levels: LogNormal | PathLevels
    weighting: str
    gamma: float
    sigma_data: float
    sigma_min: float
    sigma_max: float
    pfgm_dims: float = 0.0

    def weight(self, sigma: Tensor) -> Tensor:
        """The weight of the x0 error at levels ``sigma`` (B,)."""
        match self.weighting:
            case "edm":
                return edm_weight(sigma, self.sigma_data)
            case "min-snr":
                return min_snr_weight(sigma, self.gamma)
            case "x0":
                return torch.ones_like(sigma)
        # Unweighted, the score's loss grows as 1 / sigma^4: the smallest noise levels dominate it. As in Song
        # et al. (2021) it is multiplied by sigma^2, which is the loss of the noise.
        target = "eps" if self.prediction == "score" else self.prediction
        return target_weight(target, self.path, sigma)

    def denoiser(self, net: nn.Module, shape: tuple[int, ...], num_classes: int) -> EDMDenoiser:
        """The denoiser around a fresh network."""
        common: dict[str, Any] = {
            "shape": shape,
            "num_classes": num_classes,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "pfgm_dims": self.pfgm_dims,
        }
        if self.prediction == "f":
            return EDMDenoiser(net, **common)
        return PathDenoiser(net, self.path, self.prediction, **common)


def denoiser_loss(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weight: Tensor,
    conditioning: ConditioningLike = None,
    *,
    data_noise: Tensor | None = None,
) -> Tensor:
    """``weight |D(x0 + sigma noise) - x0|^2`` per sample, averaged over its dimensions, (B,).

    From noisy data a sample that is itself ``x0 + s n`` is taken to the level sigma by ``sqrt(sigma^2 -
    s^2)`` of fresh noise, and the prediction is turned into that of the sample
    (:func:`~distmatch.losses.noisy_mean`). The minimizer is the same D.

    Args:
        denoiser: The denoiser to train.
        x0: Samples (B, *shape).
        sigma: Noise levels (B,), positive; not below ``data_noise``.
        noise: Unit noise like ``x0``, of standard deviation 1 where Gaussian; it is scaled here.
        weight: (B,).
        conditioning: Labels (B,) int64, -1 for none.
        data_noise: Standard deviation s of the noise that is in each sample already, (B,); None for 0.
    """
    if data_noise is None:
        return denoising_loss(denoiser(x0 + expand(sigma, x0) * noise, sigma, conditioning), x0, weight)
    # For s = 0 the root is sigma and the mean D, both exactly: IEEE's root of a square is exact.
    fresh = ((sigma - data_noise) * (sigma + data_noise)).clamp_min(0).sqrt()
    x = x0 + expand(fresh, x0) * noise
    prediction = noisy_mean(denoiser(x, sigma, conditioning), x, sigma, data_noise)
    return denoising_loss(prediction, x0, weight)


def build_objective(config: TeacherConfig, sigma_data: float, path: NoisePath | None = None) -> Objective:
    """Settles what the options leave open.

    On EDM's path, and where the network predicts EDM's F, the teacher is that of EDM. Elsewhere the network
    predicts what is usual on the path, levels are drawn uniformly in its time, and the loss is that of the
    prediction, unweighted.

    Args:
        config: The options.
        sigma_data: Standard deviation of the data.
        path: Used instead of the path that the options name.

    Raises:
        UserError: An unknown path, one that does not reach its prior, or choices that do not go together.
    """
    if path is None:
        ends = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max}
        path = parse_path(config.path, sigma_data=sigma_data, **ends)
    low, high = max(config.sigma_min, path.rho_min), min(config.sigma_max, path.rho_max)
    if path.name != "edm":
        check_prior(path, sigma_data, rho_max=high)
    prediction: str = config.prediction
    if prediction == "auto":
        prediction = "flow" if path.name in _FLOWS else _USUAL.get(path.name, "eps")
    weighting = config.weighting
    if weighting == "auto":
        weighting = "edm" if prediction == "f" else "target"
    if weighting == "target" and prediction == "f":
        weighting = "edm"  # F is scaled so that its unweighted loss is this one
    spacing = config.noise_distribution
    if spacing == "auto":
        spacing = "log-normal" if path.name == "edm" else "uniform"
    _refuse_idle(config, spacing, weighting)
    levels: LogNormal | PathLevels
    if spacing == "log-normal":
        levels = LogNormal(config.noise_mean, config.noise_std)
    else:
        levels = PathLevels(path, low, high, spacing, config.logit_mean, config.logit_std)
    gamma, dims = config.min_snr_gamma, config.pfgm_dims
    return Objective(path, prediction, levels, weighting, gamma, sigma_data, low, high, dims)


def _refuse_idle(config: TeacherConfig, spacing: str, weighting: str) -> None:
    """Refuses options that were set and would do nothing.

    Raises:
        UserError: With the option and what it needs.
    """
    needs = {
        ("noise_mean", "noise_std"): (spacing == "log-normal", "--noise-distribution log-normal"),
        ("logit_mean", "logit_std"): (spacing == "logit-normal", "--noise-distribution logit-normal"),
        ("min_snr_gamma",): (weighting == "min-snr", "--weighting min-snr"),
        ("condition_noise_kind",): (config.condition_noise > 0, "--condition-noise"),
        ("ambient_given",): (config.ambient_noise > 0, "--ambient-noise"),
        ("ambient_clean",): (
            config.ambient_noise > 0 and not config.ambient_given,
            "--ambient-noise, and data to which it is added here",
        ),
        ("observe_noise", "observe_given", "observe_every"): (bool(config.observe), "--observe"),
    }
    defaults = {f.name: f.default for f in fields(config)}
    for names, (used, need) in needs.items():
        for name in names:
            if not used and getattr(config, name) != defaults[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} does nothing here",
                    got=getattr(config, name),
                    expected=f"it goes with {need}",
                    fix="leave it out, or give that too",
                )
