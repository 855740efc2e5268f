"""`distmatch train`."""

from __future__ import annotations

from distmatch.cli.parse import parse_run, print_json
from distmatch.training.options import TrainOptions

ABOUT = """Train a diffusion teacher (EDM loss and preconditioning).

example: distmatch train --data digits --steps 3000 --out runs/teacher
         distmatch train --data my_images/ --net unet --out runs/mine --dry-run"""


def run(argv: list[str]) -> None:
    """Parses, trains, prints where the teacher is."""
    options, place = parse_run(TrainOptions, argv, verb="train", about=ABOUT)
    from distmatch.cli.running import check_place, dry_run, execute, open_folder
    from distmatch.training.prepare_teacher import prepare_training

    check_place(place, (options.data,))
    job = prepare_training(options)
    if place.dry_run:
        dry_run(job, place)
        return
    with open_folder(place, (options.data,)) as folder:
        result = execute(job, folder, place)
    if place.json:
        print_json(result)
    else:
        loss = result["last"].get("loss", float("nan"))
        print(f"teacher in {result['model']} after {result['steps']} steps, loss {loss:.4f}")
        print(f"next: distmatch distill --teacher {place.out} --out runs/student")
