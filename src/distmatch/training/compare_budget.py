"""What every run of a comparison may spend, and how many steps that pays for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from distmatch.base.errors import UserError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(?:\d+(?:\.\d+)?\s*[smh]\s*)+")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)\s*(?:network\s+)?(steps?|calls?)")


@dataclass(frozen=True)
class Price:
    """What something costs in wall-clock seconds and in network calls."""

    seconds: float
    calls: float


@dataclass(frozen=True)
class Budget:
    """What every run may spend.

    Attributes:
        amount: How much.
        unit: Of what.
    """

    amount: float
    unit: Literal["seconds", "calls", "steps"]

    def steps(self, step: Price, once: Price) -> int:
        """The steps that it pays for, at least one.

        Args:
            step: What one step costs.
            once: What is made once, at the first step.

        Raises:
            UserError: It does not pay for what is made once, or there is no end to what it pays for.
        """
        if self.unit == "steps":
            return max(1, int(self.amount))
        price, first = getattr(step, self.unit), getattr(once, self.unit)
        if price <= 0:
            raise UserError(
                "a budget of network calls does not limit this method, whose steps make none",
                fix="give a budget of time or steps",
            )
        if first >= self.amount:
            raise UserError(
                "the budget does not pay for what this method makes once, before its first step",
                got=f"{self.amount:g} {self.unit}",
                expected=f"more than {first:.3g} {self.unit}",
                fix="raise --budget",
            )
        return max(1, int((self.amount - first) / price))


def parse_budget(text: str) -> Budget:
    """A budget from text.

    Raises:
        UserError: It is none.
    """
    plain = text.strip()
    if _TIME.fullmatch(plain):
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smh])", plain)
        budget = Budget(sum(float(number) * _SECONDS[unit] for number, unit in parts), "seconds")
    elif match := _COUNT.fullmatch(plain):
        number, prefix, unit = match.groups()
        amount = float(number) * {"": 1.0, "k": 1e3, "m": 1e6}[prefix.lower()]
        budget = Budget(amount, "steps" if unit.startswith("step") else "calls")
    else:
        budget = Budget(0.0, "steps")
    if budget.amount <= 0:
        raise UserError(
            "this is no budget",
            got=repr(text),
            expected="a time (90s, 5m, 1h30m), network calls (200k calls) or steps (2000 steps)",
            fix='for example --budget 5m, or --budget "2000 steps"',
        )
    return budget
