"""`distmatch train`."""

from __future__ import annotations

from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import TrainingPlace, parse_run
from distmatch.training.options import TrainOptions

HELP = Help(
    """Train a diffusion teacher (EDM loss and preconditioning).

example: distmatch train --data digits --steps 3000 --out runs/teacher
         distmatch train --data my_images/ --net unet --out runs/mine --dry-run""",
    short="data labels steps batch seed device flip net width lr path out config resume overwrite "
    "dry_run json",
    groups={
        "Path, noise distribution and "
        "weighting": "noise_mean noise_std sigma_data sigma_min sigma_max path prediction "
        "noise_distribution logit_mean logit_std weighting min_snr_gamma learned_uncertainty",
        "Noise on data and labels": "label_dropout condition_noise condition_noise_kind pfgm_dims "
        "instance_noise ambient_noise ambient_clean ambient_given",
        "Training from observations": "observe observe_noise observe_given observe_every",
    },
)


def run(argv: list[str]) -> None:
    """Parses, trains, prints where the teacher is."""
    options, place = parse_run(TrainOptions, argv, verb="train", said=HELP, place=TrainingPlace)
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
    from distmatch.training.auto import note
    from distmatch.training.prepare_teacher import prepare_training

    check_place(place, (options.data,))
    options, choices = tuned(options, place, argv, lambda other: prepare_training(other, fresh=False))
    job = prepare_training(options, fresh=starts_afresh(place))
    note(job, choices)
    if place.dry_run:
        dry_run(job, place)
        return
    with open_folder(place, (options.data,)) as folder, going_on("train", place):
        result = execute(job, folder, place)
    if place.json:
        print_json(result)
    else:
        loss = result["last"].get("loss", float("nan"))
        print(f"{result_line(result, 'teacher')}, loss {loss:.4f}")
        print(f"next: distmatch distill --teacher {place.out} --out runs/student")
