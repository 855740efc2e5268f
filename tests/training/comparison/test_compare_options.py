"""What a comparison is told: methods and their settings, budgets, and what every method gets."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from distmatch.base.errors import UserError
from distmatch.cli.parse import options_from
from distmatch.training.comparison.options import (
    CompareOptions,
    Price,
    SharedOptions,
    check_shared,
    entry_options,
    parse_budget,
    parse_methods,
    shared_settings,
)
from distmatch.training.options import NetOptions, RunOptions
from tests.helpers.command import command


def shared(run: RunOptions | None = None, **settings: object) -> SharedOptions:
    given = dataclasses.replace(shared_settings(), **settings)
    return SharedOptions(teacher="ring8", run=run or RunOptions(), settings=given)


def test_methods_divergences_settings_and_names() -> None:
    text = """dmd2, f-distill:js,f_distill:alpha:0.5,
        my own=f-distill:kl[gan-weight=0.03, order=alternate, multipliers=[1,2]],"""
    entries = parse_methods(text)
    assert [(e.method, e.divergence) for e in entries] == [
        ("dmd2", None),
        ("f-distill", "js"),
        ("f-distill", "alpha:0.5"),
        ("f-distill", "kl"),
    ]
    assert [e.name for e in entries] == ["dmd2", "f-distill:js", "f-distill:alpha:0.5", "my own"]
    assert [e.folder for e in entries] == ["dmd2", "f-distill-js", "f-distill-alpha-0.5", "my-own"]
    assert entries[3].settings == {"gan_weight": 0.03, "order": "alternate", "multipliers": [1, 2]}


def test_folders_are_unique() -> None:
    entries = parse_methods("a b=dmd2,a-b=diff-instruct,a_b=f-distill")
    assert [e.folder for e in entries] == ["a-b", "a-b-2", "a-b-3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no methods"),
        ("dmd3", "did you mean"),
        ("dmd2,dmd2", "twice"),
        ("dmd2,other=dmd2", "twice"),
        ("a=dmd2,a=diff-instruct", "one name"),
        ("dmd2[lr=1", "brackets do not match"),
        ("dmd2[lr]", "has no value"),
        ("dmd2]x[", "no method"),
    ],
)
def test_methods_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_methods(text)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("90s", 90, "seconds"),
        ("5m", 300, "seconds"),
        ("1h30m", 5400, "seconds"),
        ("0.5 h", 1800, "seconds"),
        ("200k calls", 200_000, "calls"),
        ("1.5M network calls", 1_500_000, "calls"),
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
    ],
)
def test_budgets(text: str, amount: float, unit: str) -> None:
    budget = parse_budget(text)
    assert (budget.amount, budget.unit) == (amount, unit)


@pytest.mark.parametrize("text", ["", "5", "0s", "-3m", "5 parsecs", "k calls", "5mm"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match="no budget"):
        parse_budget(text)


def test_a_budget_pays_for_whole_steps_and_for_one_at_least() -> None:
    step, nothing, once = Price(0.3, 7.0), Price(0.0, 0.0), Price(4.0, 30.0)
    assert parse_budget("10s").steps(step, nothing) == 33
    assert parse_budget("10s").steps(step, once) == 20
    assert parse_budget("100 calls").steps(step, nothing) == 14
    assert parse_budget("100 calls").steps(step, once) == 10
    assert parse_budget("12 steps").steps(step, once) == 12
    assert parse_budget("0.1s").steps(step, nothing) == 1
    with pytest.raises(UserError, match="more than 4 seconds"):
        parse_budget("3s").steps(step, once)
    with pytest.raises(UserError, match="does not limit"):
        parse_budget("3 calls").steps(Price(1.0, 0.0), once)


def test_a_run_gets_the_defaults_of_its_method_then_what_is_shared_then_its_own() -> None:
    first, second, third = parse_methods("dmd2,diff-instruct,f-distill:kl[gan_weight=0.5,batch=64]")
    common = shared(RunOptions(batch=128), gan_weight=0.03, lr=2e-4)
    runs = [entry_options(common, entry, seed=7, steps=99) for entry in (first, second, third)]
    weights = [getattr(o.settings, "gan_weight", None) for o in runs]
    assert weights == [0.03, None, 0.5]  # diff-instruct has no such term
    assert [o.run.batch for o in runs] == [128, 128, 64]
    assert all(o.settings.lr == 2e-4 and o.run.seed == 7 and o.run.steps == 99 for o in runs)
    assert [o.divergence for o in runs] == ["reverse_kl", "reverse_kl", "kl"]
    assert all(o.teacher == "ring8" for o in runs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dmd2[gan_wait=1]", "did you mean gan_weight"),
        ("dmd2[steps=5]", "the budget decides"),
        ("dmd2[seed=5]", "same seeds"),
        ("dmd2[gan_weight=much]", "wrong value for distill.gan_weight"),
        ("dmd2[order=backwards]", "order"),
    ],
)
def test_settings_that_make_no_sense(text: str, said: str) -> None:
    (entry,) = parse_methods(text)
    with pytest.raises(UserError, match=said):
        entry_options(shared(), entry, seed=0, steps=10)


def test_shared_options_that_the_comparison_decides_are_refused() -> None:
    entries = parse_methods("diff-instruct")
    for wrong, said in (
        (SharedOptions(run=RunOptions(steps=50)), '--budget "50 steps"'),
        (shared(gan_weight=0.2), "none of these methods reads it"),
        (shared(lr=-1.0), "--lr must be positive"),
    ):
        with pytest.raises(UserError, match=said):
            check_shared(wrong, entries)
    check_shared(shared(gan_weight=0.2), parse_methods("diff-instruct,dmd2"))
    for option, said in (("method dmd2", "--methods"), ("divergence js", "after its method")):
        answer = command(f"compare --methods sid --teacher ring8 --{option} --dry-run")
        assert (answer.code, said in answer.err) == (2, True)


def test_every_option_has_a_flag_of_its_own() -> None:
    """The parser puts all groups on one level: a name that stands twice would be an internal error."""
    plain = CompareOptions()

    def flags(group: object) -> list[str]:
        parts = [(f.name, getattr(group, f.name)) for f in dataclasses.fields(group)]  # type: ignore[arg-type]
        nested = [flags(value) if dataclasses.is_dataclass(value) else [name] for name, value in parts]
        return [name for names in nested for name in names]

    names = flags(plain)
    assert len(names) == len(set(names))
    assert {f.name for f in dataclasses.fields(NetOptions)} <= set(names)


def test_reading_the_options_takes_no_torch() -> None:
    modules = "distmatch.training.comparison.options, distmatch.cli.compare"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("compare_*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_of_comparisons_can_be_used(recipe: Path) -> None:
    options = options_from(CompareOptions, recipe, "compare")
    entries = parse_methods(options.methods)
    check_shared(options.shared, entries)
    assert options.baseline in [entry.name for entry in entries]
    assert parse_budget(options.budget).amount > 0
    assert recipe.name in recipe.read_text()
