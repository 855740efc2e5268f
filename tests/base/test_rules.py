"""Rules in the types of settings: what they take, what they refuse, and what is said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest

from distmatch.base.errors import UserError
from distmatch.base.rules import (
    Count,
    CountOrNone,
    Decay,
    Finite,
    NotNegative,
    Positive,
    Share,
    between,
    check_rule,
    check_rules,
)


@dataclass(frozen=True, kw_only=True)
class Own:
    learning_rate: Positive = 1.0
    clip: NotNegative = 0.0
    mean: Finite = -1.0
    share: Share = 1.0
    decay: Decay = 0.0
    count: Count = 1
    extra: CountOrNone = 0
    halvings: Annotated[int, between(0, 30)] = 30
    law: Literal["karras", "log-normal"] = "karras"
    name: str = ""

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True, kw_only=True)
class Inherited(Own):
    flags: ClassVar[bool] = False
    learning_rate: Positive = 2.0


WRONG = {
    "learning_rate": (0.0, -1.0, math.inf),
    "clip": (-1e-9, math.inf),
    "mean": (math.inf, -math.inf),
    "share": (-0.1, 1.1),
    "decay": (-0.1, 1.0),
    "count": (0, -1),
    "extra": (-1,),
    "halvings": (-1, 31),
    "law": ("uniform", 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_out_of_range_are_refused_by_the_name_of_their_option(name: str) -> None:
    number = isinstance(WRONG[name][0], float)
    for value in (*WRONG[name], *([math.nan] if number else [])):
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must") as caught:
            Own(**{name: value})
        assert repr(value).strip("'") in str(caught.value)
        with pytest.raises(UserError, match=f"^{name} must"):  # of classes that are no command line's
            Inherited(**{name: value})
        with pytest.raises(UserError, match="must"):
            check_rule(Own, name, value)


def test_what_is_at_the_border_or_has_no_rule_is_taken() -> None:
    assert Own(clip=0, share=0, decay=0.999, extra=0, halvings=0, law="log-normal", name="any").clip == 0
    check_rule(Own, "name", -1)
    assert Inherited().learning_rate == 2.0
