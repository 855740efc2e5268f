"""How fast an absorbing process hides tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_name, check_number, check_rising
from distmatch.base.errors import unknown_name


@dataclass(frozen=True)
class MaskSchedule:
    """The probability that a token is hidden at time t in [0, 1], in terms of the total noise s(t).

    A token is still visible with probability exp(-s(t)); s grows from about 0.

    Attributes:
        name: What it is called.
        total: t -> s(t).
        rate: t -> s'(t).
        time: s -> t, the inverse of ``total``.
    """

    name: str
    total: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]

    def hidden(self, t: Tensor) -> Tensor:
        """Probability 1 - exp(-s(t)) that a token is hidden at ``t``."""
        return -torch.expm1(-self.total(t))

    def hazards(self, steps: int, rule: str = "tweedie") -> Tensor:
        """Probability that a token still hidden is revealed in each of ``steps`` equal steps from t = 1 to 0.

        ``tweedie`` is exact for the process: (e^{-s(u)} - e^{-s(t)}) / (1 - e^{-s(t)}) for a step from t to
        u. ``euler`` takes the rate at the start of the step: dt s'(t) / (e^{s(t)} - 1), at most 1. For the
        log-linear schedule they agree. The last step reveals all.

        Returns:
            (steps,) float64 on the CPU.

        Raises:
            UserError: No step, or an unknown rule.
        """
        check_count("the number of steps", steps)
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if rule == "tweedie":
            hidden = self.hidden(grid)
            p = 1 - hidden[1:] / hidden[:-1]
        elif rule == "euler":
            p = self.rate(grid[:-1]) / torch.expm1(self.total(grid[:-1])) / steps
        else:
            raise unknown_name("rule for a step", rule, ("tweedie", "euler"))
        p[-1] = 1.0
        return p.clamp(0, 1)


def log_linear(floor: float = 1e-3) -> MaskSchedule:
    """Hidden with probability (1 - floor) t: s = -log(1 - (1 - floor) t), the default of SEDD and RADD."""
    slope = 1 - _inside("floor", floor)
    return MaskSchedule(
        "log-linear",
        total=lambda t: -torch.log1p(-slope * t),
        rate=lambda t: slope / (1 - slope * t),
        time=lambda s: -torch.expm1(-s) / slope,
    )


def cosine(floor: float = 1e-3) -> MaskSchedule:
    """Visible with probability floor + (1 - floor) cos(pi t / 2): slow at the data, fast at the noise."""
    slope = 1 - _inside("floor", floor)

    def visible(t: Tensor) -> Tensor:
        return floor + slope * torch.cos(math.pi / 2 * t)

    return MaskSchedule(
        "cosine",
        total=lambda t: -torch.log(visible(t)),
        rate=lambda t: slope * math.pi / 2 * torch.sin(math.pi / 2 * t) / visible(t),
        time=lambda s: torch.acos(((torch.exp(-s) - floor) / slope).clamp(-1, 1)) * 2 / math.pi,
    )


def geometric(low: float = 1e-5, high: float = 20.0) -> MaskSchedule:
    """The total noise grows by equal factors: s = low^(1 - t) high^t."""
    check_rising(low=low, high=high)
    growth = math.log(high / low)
    return MaskSchedule(
        "geometric",
        total=lambda t: low * torch.exp(growth * t),
        rate=lambda t: growth * low * torch.exp(growth * t),
        time=lambda s: torch.log(s / low) / growth,
    )


SCHEDULES: Mapping[str, Callable[[], MaskSchedule]] = {
    "log-linear": log_linear,
    "cosine": cosine,
    "geometric": geometric,
}


def mask_schedule(schedule: str | MaskSchedule) -> MaskSchedule:
    """The schedule of a name with its default settings; a schedule is returned as it is.

    Raises:
        UserError: The name is unknown.
    """
    if isinstance(schedule, MaskSchedule):
        return schedule
    check_name("mask schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule]()


def _inside(name: str, value: float) -> float:
    check_number(f"the {name} of a mask schedule", value, "(0, 1)")
    return value
