"""What a scheduler of diffusers says about a teacher: its path, its levels, what it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distmatch.base.errors import UserError, unknown_name
from distmatch.diffusion.paths import NoisePath, condot, discrete_path
from distmatch.interop.times import Scaled

# All of these share the noise rates and the prediction types of DDPM; they differ in how they sample only.
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SCHEDULERS = (*DISCRETE, *EDM, *FLOW)

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Schedule:
    """A scheduler in our terms.

    Attributes:
        family: ``"discrete"``, ``"edm"`` or ``"flow"``.
        path: The path that x_t is on; None for EDM, which is our frame already.
        prediction: What the network predicts, one of PREDICTIONS; for EDM ``"edm"`` or ``"-edm"``.
        time: How the network counts time; None: as the path does.
        sigma_data: Standard deviation of the data where the scheduler states it.
        ends: Smallest and largest noise level where the scheduler states them.
    """

    family: str
    path: NoisePath | None
    prediction: str
    time: Scaled | None = None
    sigma_data: float | None = None
    ends: tuple[float, float] | None = None


def read_schedule(scheduler: Any) -> Schedule:
    """What ``scheduler`` says about the teacher it belongs to.

    Raises:
        UserError: A scheduler or an option of it that is not understood.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in EDM:
        return _edm(config)
    if name in FLOW:
        if getattr(config, "invert_sigmas", False):
            raise UserError("schedulers with invert_sigmas are not read", fix="use dm.as_denoiser")
        steps = float(config.num_train_timesteps)
        return Schedule("flow", condot(t_min=1 / steps, t_max=1 - 1 / steps), "flow", Scaled(steps))
    if name in DISCRETE:
        return _discrete(scheduler, config)
    raise unknown_name("scheduler", name, SCHEDULERS)


def _edm(config: Any) -> Schedule:
    signs = {"epsilon": "edm", "v_prediction": "-edm"}
    if config.prediction_type not in signs:
        raise unknown_name("prediction_type of an EDM scheduler", config.prediction_type, signs)
    ends = (float(config.sigma_min), float(config.sigma_max))
    return Schedule("edm", None, signs[config.prediction_type], None, float(config.sigma_data), ends)


def ends_in_noise(scheduler: Any) -> bool:
    """Whether the last level of a discrete scheduler is pure noise (zero terminal signal)."""
    flag = bool(getattr(scheduler.config, "rescale_betas_zero_snr", False))
    return flag or float(scheduler.alphas_cumprod[-1]) == 0.0


def _discrete(scheduler: Any, config: Any) -> Schedule:
    kind = config.prediction_type
    if kind not in _PREDICTIONS:
        raise unknown_name("prediction_type", kind, _PREDICTIONS)
    # In the precision of diffusers: these are the levels that the network was trained at.
    squares = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
    if ends_in_noise(scheduler):
        # A last level of pure noise has no place in a frame that divides by alpha.
        squares = squares[:-1]
        if kind == "epsilon":
            raise UserError(
                "noise predicted at pure noise says nothing about the image",
                got="prediction_type epsilon with rescale_betas_zero_snr",
                expected="v_prediction or sample",
                fix="check scheduler_config.json",
            )
    return Schedule("discrete", discrete_path(squares), _PREDICTIONS[kind])
