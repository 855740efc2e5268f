"""The options of the watch, of `train` and of `distill`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distmatch.base.errors import UserError
from distmatch.base.rules import CountOrNone, Rule, check_rules

LEAST_SAMPLES = 24
"""Samples that an evaluation needs: two blocks of twelve."""
Samples = Annotated[
    int, Rule(f"must be 0 or at least {LEAST_SAMPLES}", lambda n: n == 0 or n >= LEAST_SAMPLES)
]


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Watch the training."""

    watch_every: CountOrNone = 0
    """Steps between measurements of samples during the training: against real data, and of a student's
    diversity against its teacher's, on fixed conditions and seeds, with warnings (docs/watch.md); 0: none."""
    watch_samples: Samples = 500
    """Samples that are measured against real data each time: fd, precision, recall, coverage; 0: none."""
    watch_grid: tuple[int, int] = (8, 8)
    """Conditions and seeds that are sampled and shown; without conditions, their product of seeds."""
    keep_best: Literal["none", "fd", "diversity", "vendi", "energy"] = "none"
    """Keep the checkpoint that is best by a measurement, besides the newest ones; a teacher's by fd."""
    result: Literal["last", "best"] = "last"
    """The checkpoint that the model is made from in the end; best: that of --keep-best."""

    def __post_init__(self) -> None:
        check_rules(self)
        if len(self.watch_grid) != 2 or self.watch_grid[0] < 1 or self.watch_grid[1] < 2:
            raise UserError(
                "--watch-grid takes a number of conditions and a number of seeds",
                got=" ".join(map(str, self.watch_grid)),
                expected="at least 1 condition and 2 seeds, for example --watch-grid 8 8",
            )
        if self.keep_best != "none" and not self.watch_every:
            raise UserError(
                "--keep-best needs measurements during training",
                got=f"--keep-best {self.keep_best} with --watch-every 0",
                fix="add --watch-every, for example --watch-every 250",
            )
        if self.keep_best == "fd" and not self.watch_samples:
            raise UserError(
                "--keep-best fd needs samples that are measured against real data",
                got="--watch-samples 0",
                fix="omit --watch-samples",
            )
        if self.result == "best" and self.keep_best == "none":
            raise UserError(
                "--result best needs to know what is best",
                got="--keep-best none",
                expected="--keep-best fd, or of a student also diversity, vendi or energy",
                fix="add --watch-every and --keep-best, for example --watch-every 250 --keep-best fd",
            )
