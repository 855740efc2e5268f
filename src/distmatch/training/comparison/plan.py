"""What a comparison will do: every method tried and timed on a state that is thrown away, steps decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.base.memory import out_of_memory
from distmatch.base.progress import tell
from distmatch.base.ranks import joined
from distmatch.data import Dataset
from distmatch.diffusion.denoiser import Denoiser
from distmatch.methods.table import resolve_method
from distmatch.training.comparison.cost import Cost, measure_cost
from distmatch.training.comparison.options import (
    Budget,
    CompareOptions,
    Entry,
    check_shared,
    entry_options,
    parse_budget,
    parse_methods,
)
from distmatch.training.prepare import prepare_distillation
from distmatch.training.trackers import check_trackers

_GUESS = 1000  # steps of a run whose cost is not known yet; schedules do not change the cost


@dataclass(frozen=True)
class Planned:
    """A method that can be used, with its cost and its steps."""

    entry: Entry
    cost: Cost
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        method, divergence = resolve_method(self.entry.method, self.entry.divergence)
        return {
            "name": self.entry.name,
            "method": method.name,
            "divergence": divergence if method.divergences else None,
            "settings": self.entry.settings,
            "folder": self.entry.folder,
            "summary": method.summary,
            "citation": method.citation,
            "steps": self.steps,
            **self.cost.to_dict(),
        }


@dataclass(frozen=True)
class Plan:
    """The methods that will run, and why others cannot: (name, reason)."""

    budget: Budget
    methods: list[Planned]
    impossible: list[tuple[str, str]]


def check_options(options: CompareOptions) -> tuple[Entry, ...]:
    """The methods of a comparison, once the options are known to make sense; loads nothing.

    Raises:
        UserError: They do not.
    """
    parse_budget(options.budget)
    entries = parse_methods(options.methods)
    check_shared(options.shared, entries)
    check_trackers(options.shared.run.track)
    if options.baseline:
        check_name("baseline", options.baseline, [entry.name for entry in entries])
    return entries


def plan_comparison(
    options: CompareOptions,
    teacher: Denoiser | None = None,
    data: Dataset | None = None,
    texts: Sequence[str] | None = None,
) -> Plan:
    """Prepares and times every method; writes nothing and trains nothing that is kept.

    Args:
        options: The options.
        teacher: Used instead of the teacher that they name.
        data: Used instead of the data that they name.
        texts: Prompts in place of those that they name.

    Raises:
        UserError: The options make no sense, or a method cannot be used with this teacher and these data,
            unless such methods are to be skipped and another one is left.
    """
    entries, budget = check_options(options), parse_budget(options.budget)
    methods: list[Planned] = []
    impossible: list[tuple[str, str]] = []
    for entry in entries:
        tell(f"compare: trying {entry.name}")
        try:
            steps = int(budget.amount) if budget.unit == "steps" else _GUESS
            chosen = entry_options(options.shared, entry, seed=options.shared.run.seed, steps=steps)
            job = prepare_distillation(chosen, teacher, data, texts=texts, fresh=False)
            cost = measure_cost(job, options.shared.run.batch).of_main(job.state.ranks)
            steps = budget.steps(cost.step, cost.once)
            if steps != chosen.run.steps:  # a method may need more of them than the budget pays for
                run = replace(chosen.run, steps=steps)
                prepare_distillation(replace(chosen, run=run), teacher, data, texts=texts, fresh=False)
        except Exception as error:  # whatever keeps one method from running is reported
            if not same_for_all(error):
                raise
            impossible.append((entry.name, reason(error)))
            continue
        methods.append(Planned(entry, cost, steps))
    names = [planned.entry.name for planned in methods]
    if impossible and (not options.skip_impossible or not methods):
        raise UserError(
            f"{len(impossible)} of {len(entries)} methods cannot be used with this teacher and data; "
            f"nothing was trained",
            got="; ".join(f"{name}: {why}" for name, why in impossible),
            fix="remove them" + (", or continue without them: --skip-impossible" if methods else ""),
        )
    if options.baseline and options.baseline not in names:
        raise UserError(
            "the baseline cannot be used with this teacher and data",
            got=options.baseline,
            fix="choose another one",
        )
    return Plan(budget, methods, impossible)


def same_for_all(error: Exception) -> bool:
    """Whether all processes have this error, so that they can go on with the next method together.

    Options and numbers that all of them share are refused by all; memory may end in one of them alone.
    """
    return joined().size == 1 or isinstance(error, UserError)


def reason(error: Exception) -> str:
    """Why something failed, in a line."""
    if isinstance(error, UserError):
        return str(error)
    if memory := out_of_memory(error):
        return str(memory)
    text = str(error).splitlines()[0] if str(error) else "no message"
    return f"{type(error).__name__}: {text}"
