"""`distmatch compare`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.metric_names import metric_of, space_of
from distmatch.base.progress import in_words
from distmatch.cli.answer import print_json
from distmatch.cli.distill import HELP as DISTILL
from distmatch.cli.help import Help
from distmatch.cli.parse import Place, parse_run
from distmatch.cli.table import in_columns
from distmatch.training.comparison.options import CompareOptions, Entry, entry_options
from distmatch.training.config_format import config_text
from distmatch.training.toml import dataclass_to_dict, to_toml

HELP = Help(
    """Distil a teacher with several methods at the same budget, and report which differences are significant.

example: distmatch compare --methods dmd2,f-distill:js,f-distill:kl --budget 5m --teacher runs/a --out runs/b
         distmatch compare --methods dmd2,sid --budget "200k calls" --seeds 5 --teacher grid25 --out runs/c
         distmatch compare --methods "dmd2,f-distill:js[gan_weight=0.03]" --teacher runs/a --dry-run""",
    short="methods budget seeds baseline teacher data batch seed device out config resume overwrite "
    "dry_run json",
    groups=DISTILL.groups,
    hidden=frozenset({"steps", "grid"}),  # the budget decides; of single runs
)

_SHOWN = (
    "fd",
    "kl",
    "modes",
    "precision",
    "recall",
    "coverage",
    "label_accuracy",
    "prompt_energy",
    "prompt_diversity",
)


def run(argv: list[str]) -> None:
    """Parses, trains and measures every method, prints the table and the path of the report."""
    options, place = parse_run(CompareOptions, argv, verb="compare", said=HELP, place=Place)
    _check_place(place)
    from distmatch.base.ranks import joined
    from distmatch.cli.running import check_place, going_on, open_folder
    from distmatch.report import build_report
    from distmatch.training.comparison.plan import check_options
    from distmatch.training.comparison.run import carry_out_comparison, prepare_comparison

    inputs = (options.shared.data, options.shared.teacher)
    check_place(place, inputs)
    if not options.shared.teacher:
        raise UserError(
            "no teacher was named", expected="--teacher with a run folder, or ring8, grid25, skewed2"
        )
    entries = check_options(options)
    if place.dry_run:
        _dry_run(options, entries, place)
        return
    prepared = prepare_comparison(options, resumed=place.out if place.resume is not None else None)
    with open_folder(place, inputs) as folder, going_on("compare", place):
        record = carry_out_comparison(prepared, folder)
        if not joined().main:
            return
        report = build_report(folder.path)
    if place.json:
        print_json({"run": str(folder.path), "report": str(report), **record})
        return
    if of := record["reference"].get("of"):
        print(f"in place of real data: {of}")
    print(comparison_table(record))
    print(f"report: {report}")


def _check_place(place: Place) -> None:
    if place.grid is not None:
        raise UserError("--grid is for the dry runs of train and distill", got=f"--grid {place.grid}")
    if place.resume not in (None, "latest"):
        raise UserError(
            "a comparison is resumed as a whole, every run from its newest checkpoint",
            got=f"--resume {place.resume}",
            expected="--resume alone",
        )


def _dry_run(options: CompareOptions, entries: tuple[Entry, ...], place: Place) -> None:
    """Shows what the comparison would do, from a few real steps of each method, and writes nothing."""
    from distmatch.training.comparison.plan import plan_comparison

    plan = plan_comparison(options)
    methods: list[dict[str, Any]] = []
    for planned in plan.methods:
        own = entry_options(options.shared, planned.entry, seed=options.shared.run.seed, steps=planned.steps)
        seconds = round(planned.cost.seconds(planned.steps), 1)
        methods.append({**planned.to_dict(), "estimated_seconds": seconds, "options": dataclass_to_dict(own)})
    total = round(options.seeds * sum(method["estimated_seconds"] for method in methods), 1)
    if place.json:
        shown = {"verb": "compare", "options": dataclass_to_dict(options), "estimated_seconds": total}
        impossible = [{"name": name, "reason": why} for name, why in plan.impossible]
        print_json({**shown, "budget": asdict(plan.budget), "methods": methods, "impossible": impossible})
        return
    print(config_text("compare", options))
    print("# not written: this is a dry run")
    for method in methods:
        print(f"\n# {method['name']}: {method['summary']} ({method['citation']})")
        for line in to_toml(_different(method["options"], dataclass_to_dict(options.shared))).splitlines():
            print(f"#   {line}" if line else "#")
        sizes = ", ".join(f"{name} {count:,}" for name, count in method["parameters"].items())
        print(f"# parameters  {sizes}")
        print(f"# memory      about {method['memory_mib']} MiB for weights, gradients and Adam")
        each = 1000 * method["seconds_per_step"]
        print(f"# a step      {each:.1f} ms, {method['calls_per_step']:.2f} network calls")
        if method["seconds_once"]:
            once = in_words(method["seconds_once"])
            print(f"# once        {once}, {method['calls_once']:.0f} network calls")
        whole = in_words(method["estimated_seconds"])
        print(f"# time        about {whole} for each seed: {method['steps']} steps")
    for name, why in plan.impossible:
        print(f"\n# {name} cannot be used: {why}")
    print(f"\n# in all      about {in_words(total)} for {options.seeds} seeds, without the evaluation")


def _different(values: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What a method has otherwise than the shared options, in the same tables."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if inner := _different(value, shared.get(key, {})):
                found[key] = inner
        elif shared.get(key) != value:
            found[key] = value
    return found


def comparison_table(record: dict[str, Any]) -> str:
    """A plain-text table: a row for each method, value ± standard error over seeds, and its cost."""
    means, costs = record["summary"]["means"], record["summary"]["costs"]
    rows = {"real data": record["reference"], "teacher": record["teacher"], **means}
    keys = dict.fromkeys(key for own in means.values() for key in own)
    shown = sorted((key for key in keys if metric_of(key) in _SHOWN), key=_place)
    lines = [["", *shown, "runs", "steps", "ms a step"]]
    methods = {method["name"]: method for method in record["methods"]}
    for name in [*list(rows)[:2], *methods]:
        own, tail = rows.get(name, {}), ["", "", ""]
        if name in methods:
            cost, asked = costs[name], sum(run["name"] == name for run in record["runs"])
            each = cost["seconds_per_step"] or methods[name]["seconds_per_step"]
            tail = [f"{cost['runs']} of {asked}", str(methods[name]["steps"]), f"{1000 * each:.1f}"]
        lines.append([name, *(_cell(own.get(metric)) for metric in shown), *tail])
    text = in_columns(lines) + _differences(record)
    text += [
        f"failed: {r['name']} seed {r['seed']}: {r['message']}"
        for r in record["runs"]
        if r["status"] == "failed"
    ]
    text += [f"skipped: {entry['name']}: {entry['reason']}" for entry in record["impossible"]]
    return "\n".join(text)


def _differences(record: dict[str, Any]) -> list[str]:
    """Which methods differ from the baseline by more than the error, in words."""
    baseline, rows = record["summary"]["baseline"], record["summary"]["differences"]
    differences = [d for d in rows if d["verdict"] in ("better", "worse")]
    if not rows:
        return []
    if all(d["verdict"] == "not known" for d in rows):
        return [f"compared with {baseline}; with one seed no difference is significant"]
    if not differences:
        return [f"compared with {baseline}, no difference is larger than its error (Holm, 5%)"]
    lines = [f"compared with {baseline}, larger than their errors (Holm, 5%):"]
    return lines + [
        f"  {d['name']} is {d['verdict']} in {d['metric']}: {d['value']:+.3g} ± {d['stderr']:.2g}"
        for d in differences
    ]


def _place(key: str) -> tuple[str, int]:
    """First feature space first, the metrics of each in the order of the table."""
    return space_of(key), _SHOWN.index(metric_of(key))


def _cell(entry: dict[str, Any] | None) -> str:
    if not isinstance(entry, dict) or entry["value"] is None:
        return "-"
    error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.2g}"
    return f"{entry['value']:.4g}{error}"
