"""`distmatch distill`."""

from __future__ import annotations

from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import TrainingPlace, parse_run
from distmatch.methods.table import find_method
from distmatch.training.options import DistillOptions
from distmatch.training.presets import LAPTOP

HELP = Help(
    """Distil a teacher into a one-step or few-step student.

example: distmatch distill --teacher runs/teacher --divergence js --out runs/js
         distmatch distill --teacher grid25 --divergence kl --steps 2000 --out runs/grid
         distmatch distill --teacher runs/teacher --method dmd2 --num-steps 2 --out runs/two

Options and defaults are those of f-distill; --method NAME --help-all shows those of another method.""",
    named="""Distil a teacher into a one-step or few-step student, by {method}.

example: distmatch distill --teacher runs/teacher --method {method} --out runs/student
         distmatch distill --teacher grid25 --method {method} --steps 2000 --out runs/grid

Options and defaults are those of {method}.""",
    groups={
        "The student and its training": "lr lr_decay lr_rampup beta1 beta2 weight_decay grad_clip",
    },
    short="data teacher method preset divergence steps batch seed device num_steps guidance lr out config "
    "resume overwrite dry_run json",
)


def _hidden(options: DistillOptions) -> list[str]:
    return [] if find_method(options.method).divergences else ["divergence"]


def _options_of(method: str | None, preset: str | None, begun: str | None = None) -> DistillOptions:
    if method is None and preset in (None, LAPTOP):
        method = begun
    return DistillOptions.of(method, preset or LAPTOP)


def run(argv: list[str]) -> None:
    """Parses, distils, prints where the student is."""
    options, place = parse_run(
        DistillOptions,
        argv,
        verb="distill",
        said=HELP,
        defaults=_options_of,
        hidden=_hidden,
        place=TrainingPlace,
    )
    from distmatch.base.files import read_json
    from distmatch.cli.memory import dry_run_without_weights
    from distmatch.cli.output import tell_conversion
    from distmatch.cli.running import (
        check_place,
        dry_run,
        execute,
        going_on,
        open_folder,
        result_line,
        starts_afresh,
        tuned,
    )
    from distmatch.data.columns import columns_of
    from distmatch.training.auto import note
    from distmatch.training.prepare import prepare_distillation

    check_place(place, (options.data, options.teacher))
    if (
        place.dry_run
        and place.resume is None
        and not (place.auto or place.auto_batch)
        and dry_run_without_weights(options, json=place.json)
    ):
        return
    options, choices = tuned(
        options, place, argv, lambda other: prepare_distillation(other, fresh=False, dry=True)
    )
    job = prepare_distillation(options, fresh=starts_afresh(place), dry=place.dry_run)
    note(job, choices)
    tell_conversion(options.teacher, str(job.notes.get("conversion", "")))
    if place.dry_run:
        dry_run(job, place)
        return
    with open_folder(place, (options.data, options.teacher)) as folder, going_on("distill", place):
        result = execute(job, folder, place)
    if place.json:
        print_json(result)
    else:
        print(result_line(result, "student"))
        if "prompts" in job.notes:
            print(f"next: distmatch evaluate {place.out}")
            print(f'      distmatch sample {place.out} --prompt "..." --n 16 --out samples.png')
            return
        print(f"next: distmatch evaluate {place.out}")
        about = read_json(folder.model / "config.json")["extra"].get("data") or {}
        form = "csv" if columns_of(about) else "png"  # a table is read again as it was read
        print(f"      distmatch sample {place.out} --n 64 --out samples.{form}")
