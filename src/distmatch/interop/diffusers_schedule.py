"""What a scheduler of diffusers says about a teacher: its path, its levels, what it predicts.

How it samples is not read: the spacing of its steps (Karras, exponential, beta, shifted times), its order,
what it clips or thresholds. A teacher here is sampled by the solvers of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError, cause
from distmatch.diffusion.paths import NoisePath, condot, discrete_path
from distmatch.interop.times import Scaled

# All of these share the noise rates and the prediction types of DDPM; only their samplers differ.
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
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if name not in SCHEDULERS or config is None:
        raise _unread(name)
    try:
        return _understood(name, scheduler, config)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"the options of this {name} are not valid", got=cause(error), fix="check scheduler_config.json"
        ) from error


def _understood(name: str, scheduler: Any, config: Any) -> Schedule:
    """What a scheduler of a known class says."""
    if name in EDM:
        return _edm(config)
    if name in FLOW:
        if getattr(config, "invert_sigmas", False):
            raise UserError("schedulers with invert_sigmas are not supported", fix="use dm.as_denoiser")
        steps = float(config.num_train_timesteps)
        return Schedule("flow", condot(t_min=1 / steps, t_max=1 - 1 / steps), "flow", Scaled(steps))
    return discrete_schedule(scheduler, config)


# Schedulers of other conventions, and the path that a network of theirs is on.
_CONVENTIONS = {
    "ScoreSdeVeScheduler": 'path="ve", prediction="score"',
    "ScoreSdeVpScheduler": 'path="vp", prediction="score"',
    "KarrasVeScheduler": 'path="edm", prediction="x0"',
    "CMStochasticIterativeScheduler": 'path="edm", prediction="x0"',
}


def _unread(name: str) -> UserError:
    """The error for another scheduler: no name is near one that counts noise in another way."""
    how = _CONVENTIONS.get(name, 'path="vp", prediction="eps"')
    return UserError(
        "this scheduler of diffusers is not supported",
        got=name[:80],
        expected=f"one of {', '.join(SCHEDULERS)}",
        fix=f"wrap the network yourself, for example dm.as_denoiser(net, {how}, shape=...), where "
        f"net(x, t) returns only the prediction and receives its training timesteps",
    )


def check_scheduler_name(name: object) -> str:
    """The name of a scheduler that is read.

    Raises:
        UserError: It is none.
    """
    if name not in SCHEDULERS:
        raise _unread(str(name))
    return str(name)


def is_continuous(scheduler: Any) -> bool:
    """Whether a network receives ln(sigma) / 4, as EDM's and Stable Video Diffusion do: no table of times."""
    config = scheduler.config
    return config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction"


def _continuous(scheduler: Any) -> Schedule:
    """EDM's preconditioning for data of unit variance, with the sign of "v": Euler's third convention."""
    squares = scheduler.alphas_cumprod[[0, -1]].double()
    ends = ((1 - squares) / squares).sqrt().tolist()
    given = (scheduler.config.sigma_min, scheduler.config.sigma_max)
    low, high = (float(end if said is None else said) for said, end in zip(given, ends, strict=True))
    return Schedule("edm", None, "-edm", None, 1.0, (low, high))


def _edm(config: Any) -> Schedule:
    signs = {"epsilon": "edm", "v_prediction": "-edm"}
    check_name("prediction_type of an EDM scheduler", config.prediction_type, signs)
    ends = (float(config.sigma_min), float(config.sigma_max))
    return Schedule("edm", None, signs[config.prediction_type], None, float(config.sigma_data), ends)


def ends_in_noise(scheduler: Any) -> bool:
    """Whether the last level of a discrete scheduler is pure noise (zero terminal signal)."""
    flag = bool(getattr(scheduler.config, "rescale_betas_zero_snr", False))
    return flag or float(scheduler.alphas_cumprod[-1]) == 0.0


def discrete_schedule(scheduler: Any, config: Any) -> Schedule:
    """What a scheduler with the noise rates of DDPM says, ``alphas_cumprod``."""
    kind = config.prediction_type
    if config.get("use_flow_sigmas") or kind == "flow_prediction":
        raise UserError(
            "flow matching is supported with its own schedulers only",
            got=f"{type(scheduler).__name__} with prediction_type {kind} and use_flow_sigmas",
            fix="save the scheduler as FlowMatchEulerDiscreteScheduler with the same num_train_timesteps; "
            "the network is the same",
        )
    if config.get("interpolation_type", "linear") != "linear":
        raise UserError(
            "this scheduler passes timesteps to the network that do not match its noise levels",
            got=f"interpolation_type {config.interpolation_type}",
            expected="linear",
            fix="set it to linear if the network was trained at the noise levels of its betas",
        )
    if is_continuous(scheduler):
        return _continuous(scheduler)
    check_name("prediction_type", kind, _PREDICTIONS)
    # In the precision of diffusers: these are the levels that the network was trained at.
    squares = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
    if not bool(((squares >= 0) & (squares < 1)).all()):
        raise UserError(
            "the betas of this scheduler do not give valid noise levels",
            got=f"alphas_cumprod from {squares.min():g} to {squares.max():g}",
            expected="numbers that fall from below 1 to 0 or above",
            fix="check beta_start, beta_end and trained_betas in scheduler_config.json",
        )
    if ends_in_noise(scheduler):
        # A last noise level of pure noise is not possible in a convention that divides by alpha.
        squares = squares[:-1]
        if kind == "epsilon":
            raise UserError(
                "noise predicted at pure noise contains no information on the image",
                got="prediction_type epsilon with rescale_betas_zero_snr",
                expected="v_prediction or sample",
                fix="check scheduler_config.json",
            )
    return Schedule("discrete", discrete_path(squares), _PREDICTIONS[kind])
