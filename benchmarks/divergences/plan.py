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
FULL = 64
"""Width of teachers. Students of width 45, 31, 19 have 55, 30, 14 % of their parameters, on 8x8 images."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a block of runs shares; noise levels in units of sigma_data, 0 the largest."""

    width: int = FULL
    start: Literal["trained", "untrained"] = "trained"
    steps: int = 8000
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
    tail, small = "digits-tail", Setting(width=31)
    short = replace(small, steps=3000)
    yield Block(task=tail, name="width 31", setting=small, divergences=ALL)
    yield Block(task="grid25", name="learned", setting=short)
    yield Block(task="grid25", name="exact", setting=replace(short, ratio="exact"))
    yield Block(task="grid25", name="learned, low noise", setting=replace(short, noise_high=0.3))
    yield Block(task="grid25", name="exact, low noise", setting=replace(short, noise_high=0.3, ratio="exact"))
    yield Block(task=tail, name="width 31, low noise", setting=replace(small, noise_high=1.0))
    yield Block(task=tail, name="equal")
    yield Block(task=tail, name="width 31, adversarial", setting=small, divergences=ALL, adversarial=(1e-3,))
    yield Block(task="fashion-tail", name="width 31", setting=small, divergences=ALL)
    yield Block(task="stacked", name="width 31", setting=small, divergences=ALL)
    yield Block(task="fashion", name="width 31", setting=small, divergences=ALL)
    yield Block(task=tail, name="untrained", setting=Setting(start="untrained"))
    yield Block(task=tail, name="width 45", setting=Setting(width=45))
    yield Block(task=tail, name="width 19", setting=Setting(width=19))
    yield Block(task=tail, name="sigma_max", setting=Setting(student_sigma=0.0))
    yield Block(task="digits", name="width 31", setting=small)
    yield Block(task=tail, name="width 31, tight clip", setting=replace(small, clip=0.5))
    yield Block(task=tail, name="width 31, wide clip", setting=replace(small, clip=8.0))
    yield Block(task="digits-tail-classes", name="width 31", setting=small)
    yield Block(task="digits-tail-classes", name="width 31, guided", setting=replace(small, guidance=2.5))
    for task in ("fashion-tail", "stacked", "fashion"):
        yield Block(task=task, name="equal")
        yield Block(
            task=task, name="width 31, adversarial", setting=small, divergences=ALL, adversarial=(1e-3,)
        )
    yield Block(task=tail, name="width 31, ten times as long", setting=replace(small, steps=80_000))
