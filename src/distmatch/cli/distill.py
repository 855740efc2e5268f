"""`distmatch distill`."""

from __future__ import annotations

from distmatch.cli.parse import parse_run, print_json
from distmatch.training.options import DistillOptions

ABOUT = """Distil a teacher into a student of one call or a few.

example: distmatch distill --teacher runs/teacher --divergence js --out runs/js
         distmatch distill --teacher grid25 --divergence kl --steps 2000 --out runs/grid
         distmatch distill --teacher runs/teacher --method dmd2 --calls 2 --out runs/two"""


def _options_of(method: str | None) -> DistillOptions:
    return DistillOptions() if method is None else DistillOptions.of(method)


def run(argv: list[str]) -> None:
    """Parses, distils, prints where the student is."""
    options, place = parse_run(DistillOptions, argv, verb="distill", about=ABOUT, defaults=_options_of)
    from distmatch.cli.output import tell_conversion
    from distmatch.cli.running import check_place, dry_run, execute, open_folder, starts_afresh
    from distmatch.training.prepare import prepare_distillation

    check_place(place, (options.data, options.teacher))
    job = prepare_distillation(options, fresh=starts_afresh(place) and not place.dry_run)
    tell_conversion(options.teacher, str(job.notes.get("conversion", "")))
    if place.dry_run:
        dry_run(job, place)
        return
    with open_folder(place, (options.data, options.teacher)) as folder:
        result = execute(job, folder, place)
    if place.json:
        print_json(result)
    else:
        print(f"student in {result['model']} after {result['steps']} steps")
        print(f"next: distmatch evaluate {place.out}")
        print(f"      distmatch sample {place.out} --n 64 --out samples.png")
