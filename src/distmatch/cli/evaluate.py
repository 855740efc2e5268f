"""`distmatch evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmatch.base.errors import UserError
from distmatch.cli.answer import print_json
from distmatch.cli.evaluate_options import EvaluateOptions
from distmatch.cli.help import Help
from distmatch.cli.parse import parse

if TYPE_CHECKING:
    from distmatch.base.ranks import Ranks
    from distmatch.cli.evaluate_options import Found

HELP = Help(
    """Evaluate samples, or the models of a run folder, against a reference, with metrics or divergences.

The samples or the run come first, the reference second or after --data.

example: distmatch evaluate runs/js
         distmatch evaluate samples.npz digits
         distmatch evaluate samples.npz --data real.npz --features pixels --json
         distmatch evaluate samples.npz digits --divergences all
         distmatch evaluate student.npz teacher.npz --divergences js,renyi:2,mmd:laplace""",
    short="what against divergences features feature_weights teacher n seed device json",
    groups={
        "How the teacher is sampled": "solver steps grid guidance",
        "This command": "seed batch device json",
    },
)


def run(argv: list[str]) -> None:
    """Parses, measures, prints the table."""
    o = parse(EvaluateOptions, argv, verb="evaluate", said=HELP)
    for flag, value in (("--n", o.n), ("--batch", o.batch)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1", got=value)
    if o.against and o.data:
        raise UserError(
            "two references are given",
            got=f"{o.against} and --data {o.data}",
            expected="one: as the second argument, or as --data",
        )
    o = replace(o, data=o.against or o.data, against="")
    if o.divergences:
        _two_sets(o)
        return
    from distmatch.base.ranks import joined
    from distmatch.data.files import data_path

    (ranks := joined()).require_same("options", repr(o))
    folder, _ = data_path(o.what)
    if not folder.exists():
        _refuse_name(o)
        raise UserError(
            f"{o.what} does not exist",
            expected="a sample file, a folder of images or a run folder",
            fix="check the path",
        )
    if _is_model(folder):
        raise UserError(
            f"{o.what} is a model folder, or a pretrained model",
            expected="samples, or a run folder, which gets the metrics.json",
            fix=f"draw samples first: distmatch sample {o.what} --n 5000 --out samples.npz",
        )
    _refuse_reference(o, folder)
    from distmatch.cli.evaluate_run import evaluate_run

    metrics, space, reference, notes = evaluate_run(o, ranks) if _is_run(folder) else _sample_file(o, ranks)
    from distmatch.cli.table import metric_table
    from distmatch.training.evaluation import plain

    if o.json:
        about: dict[str, Any] = {"reference": reference, "features": space.name, "seed": o.seed}
        if space.fingerprint:
            about["fingerprint"] = space.fingerprint
        if notes:
            about["notes"] = notes
        print_json({**plain(metrics), "evaluation": about})
    else:
        print(f"{o.what} against {reference}, the reference")
        print(metric_table(metrics, space.description, notes))


def _is_model(folder: Path) -> bool:
    from distmatch.training.teachers import is_from_elsewhere

    return (folder / "model.safetensors").exists() or is_from_elsewhere(folder)


def _is_run(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file() or (folder / "config.toml").exists()


def _refuse_name(o: EvaluateOptions) -> None:
    """Refuses the name of a data set as what is measured: it is what samples are measured against."""
    from distmatch.data import DATA_NAMES

    if o.what in DATA_NAMES:
        raise UserError(
            f"{o.what} is a data set, and the samples or the run come first",
            expected="samples or a run, then the real data",
            fix=f"distmatch evaluate {o.data or 'samples.npz'} {o.what}",
        )


def _refuse_reference(o: EvaluateOptions, folder: Path) -> None:
    """Refuses a model as the reference."""
    reference = Path(o.data)
    if not reference.is_dir() or not o.data or not (_is_run(reference) or _is_model(reference)):
        return
    swapped = _is_run(reference) and not _is_run(folder)
    raise UserError(
        f"{o.data} is a {'run' if _is_run(reference) else 'model'}, and the reference is data",
        expected="a run or samples first, then real data or samples",
        fix=f"name the run first: distmatch evaluate {o.data} {o.what}"
        if swapped
        else f"draw samples of it: distmatch sample {o.data} --n 5000 --out samples.npz",
    )


def _two_sets(o: EvaluateOptions) -> None:
    """Divergences between two sets of samples."""
    if not o.data:
        raise UserError(
            "divergences are between two sets of samples",
            got=f"{o.what} alone",
            expected="distmatch evaluate SAMPLES REFERENCE --divergences all, where the reference is p",
            fix="name the reference",
        )
    if o.teacher:
        raise UserError(
            "--teacher has no part in --divergences", got=o.teacher, expected="two sets of samples alone"
        )
    for source in (o.what, o.data):
        if _is_model(Path(source)) or _is_run(Path(source)):
            raise UserError(
                f"{source} is a model, and divergences are computed between samples",
                expected="a sample file, a folder of images, or the name of a data set",
                fix=f"draw samples first: distmatch sample {source} --n 5000 --out samples.npz",
            )
    from distmatch.cli.divergences import between, divergence_table

    found = between(o.data, o.what, o.divergences, o.features, o.n, o.seed, o.device, o.feature_weights)
    if o.json:
        print_json({"p": o.data, "q": o.what, "features": found.features, "seed": o.seed, **found.to_dict()})
    else:
        print(divergence_table(o.data, o.what, found))


def _sample_file(o: EvaluateOptions, ranks: Ranks) -> Found:
    """Metrics of a sample file, with the floor; the feature space, the reference, remarks."""
    from distmatch.cli.output import warn_of_shares
    from distmatch.data import TOY_NAMES, load_data, toy
    from distmatch.data.classes import matched, names_of
    from distmatch.metrics import evaluate, plan, reference_floor
    from distmatch.metrics.notes import notes_on
    from distmatch.training.shared_draw import shared_features

    if not o.data:
        raise UserError(
            "no real data to measure against", expected="--data, for example --data digits", fix="pass --data"
        )
    real = load_data(o.data)
    given = load_data(o.what, columns=real.columns)
    if given.kind != real.kind or given.shape != real.shape:
        raise UserError(
            "the samples have another shape than the real data",
            got=f"{given.kind}s {given.shape}",
            expected=f"{real.kind}s {real.shape}",
        )
    if real.scaling.kind == "vector":  # vectors are measured in the units of the real data, not in their own
        given = replace(given, scaling=real.scaling)
    given = matched(given, names_of(real), real.num_classes, "the real data")
    labels = given.labels if real.labels is not None else None
    if labels is not None and real.labels is not None:
        warn_of_shares(labels, real.labels, names_of(real))
    mixture = toy(o.data) if o.data in TOY_NAMES else None
    space = shared_features(o.features, real, ranks, o.feature_weights)
    settings = plan(real, len(given), features=space, n=o.n, seed=o.seed)
    common: dict[str, Any] = {"features": space, "n": settings.n, "seed": o.seed, "mixture": mixture}
    floor = reference_floor(real, stratified=labels is not None, ranks=ranks, **common)
    metrics = {"reference": floor, "samples": evaluate(given, real, labels=labels, ranks=ranks, **common)}
    return metrics, space, o.data, notes_on(real, space, settings.n)
