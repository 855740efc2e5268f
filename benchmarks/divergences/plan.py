"""The runs of the study, in the order of what they answer, and what the theory predicts of them.

What the theory predicts, written down before the first run. A student that can match its teacher ends there
under every divergence, so:

1. equal size, started as a copy: no difference that can be told;
2. a smaller student cannot match it. KL should then have the smaller KL(p||q), the larger recall and more
   of the rare modes than reverse KL, and reverse KL the larger precision; JS and Hellinger between them,
   Jeffreys near KL; softened reverse KL, whose weight falls with r, at the far end. The smaller the student,
   the larger the difference;
3. an untrained start loses modes that a copy has; where r is large KL pulls them back first. Longer training
   makes this difference smaller, and not that of 2;
4. inside separate modes the scores do not depend on the modes' shares, so shares are learned at noise levels
   where modes overlap. There r is near one and all weights are alike. Without these levels the difference
   grows;
5. with the exact ratio differences are as large as or larger than with the one that a discriminator learns,
   which is close to one where it has learned nothing; a tight clip removes them, a wide one adds variance to
   KL;
6. a guided teacher is not what the ratio compares with (it compares real data): KL is then pulled away from
   the teacher towards the data, and its KL(p||q) to the guided teacher is not better;
7. the adversarial term pulls every divergence towards the data, so that it makes differences smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

ALL = ("softened_reverse_kl", "reverse_kl", "js", "hellinger", "jeffreys", "kl")
THREE = ("reverse_kl", "js", "kl")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Width and depth of a teacher, and the learning rate of its students; the fake score has twice it."""

    width: int
    depth: int
    lr: float


LARGE = Size(width=128, depth=3, lr=1e-3)
"""Students of width 90 and 62 have about a half and a quarter of its parameters."""
SMALL = Size(width=64, depth=2, lr=2e-3)
"""For the plane. On 8x8 images students this small draw one typical image of each class. Width 31 is 30 %."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a block of runs shares; noise levels in units of sigma_data, 0 the largest."""

    teacher: Size = LARGE
    width: int | None = None
    """Of students; None for that of the teacher."""
    start: Literal["trained", "untrained"] = "trained"
    steps: int = 6000
    student_sigma: float = 5.0
    noise_high: float = 0.0
    ratio: Literal["learned", "exact"] = "learned"
    clip: float = 3.0
    guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Block:
    """Runs that differ in divergence, adversarial weight and seed alone, trained as one stack."""

    task: str
    name: str
    setting: Setting = Setting()
    divergences: tuple[str, ...] = THREE
    adversarial: tuple[float, ...] = (0.0,)


def blocks() -> Iterator[Block]:
    """All of them, the ones that answer most first."""
    tail, half = "digits-tail", Setting(width=90)
    yield Block(task=tail, name="equal")
    yield Block(task="fashion-tail", name="half", setting=half)
    yield Block(task=tail, name="half", setting=half)
    yield Block(task=tail, name="half, adversarial", setting=half, adversarial=(1e-3,))
    yield Block(task="stacked", name="half", setting=half)
    yield Block(task=tail, name="half, low noise", setting=replace(half, noise_high=1.0))
    yield Block(task="fashion", name="half", setting=half)
    yield Block(task=tail, name="quarter", setting=Setting(width=62))
    yield Block(task=tail, name="untrained", setting=Setting(start="untrained"))
    others = ("softened_reverse_kl", "reverse_kl", "hellinger", "jeffreys")
    yield Block(task=tail, name="half, others", setting=half, divergences=others)
    yield Block(task=tail, name="sigma_max", setting=replace(half, student_sigma=0.0))
    yield Block(task="digits", name="half", setting=half)
    yield Block(task=tail, name="half, tight clip", setting=replace(half, clip=0.5))
    yield Block(task=tail, name="half, wide clip", setting=replace(half, clip=8.0))
    yield Block(task="digits-tail-classes", name="half", setting=half)
    yield Block(task="digits-tail-classes", name="half, guided", setting=replace(half, guidance=2.5))
    for task in ("fashion-tail", "stacked", "fashion"):
        yield Block(task=task, name="equal")
        yield Block(task=task, name="half, adversarial", setting=half, adversarial=(1e-3,))
    yield Block(task=tail, name="half, ten times as long", setting=replace(half, steps=60_000))
    tiny = Setting(teacher=SMALL, width=31, steps=8000)
    yield Block(task=tail, name="width 31", setting=tiny, divergences=ALL)
    short = replace(tiny, steps=3000)
    yield Block(task="grid25", name="learned", setting=short)
    yield Block(task="grid25", name="exact", setting=replace(short, ratio="exact"))
    yield Block(task="grid25", name="learned, low noise", setting=replace(short, noise_high=0.3))
    yield Block(task="grid25", name="exact, low noise", setting=replace(short, noise_high=0.3, ratio="exact"))
    for name, setting in (
        ("width 19", replace(short, width=19)),
        ("width 45", replace(short, width=45)),
        ("equal", replace(short, width=None)),
        ("equal, exact", replace(short, width=None, ratio="exact")),
        ("equal, untrained", replace(short, width=None, start="untrained")),
        ("equal, exact, untrained", replace(short, width=None, ratio="exact", start="untrained")),
        ("exact, tight clip", replace(short, ratio="exact", clip=0.5)),
        ("exact, wide clip", replace(short, ratio="exact", clip=8.0)),
        ("sigma_max", replace(short, student_sigma=0.0)),
        ("ten times as long", replace(short, steps=30_000)),
    ):
        yield Block(task="grid25", name=name, setting=setting)
    yield Block(task="grid25", name="adversarial", setting=short, adversarial=(1e-3,))
