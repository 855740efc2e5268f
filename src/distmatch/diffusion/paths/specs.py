"""Noise paths as text and as JSON: what an option says, and what a saved model keeps of its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.paths.kinetic import kinetic_path
from distmatch.diffusion.paths.named import PATHS, noise_path

KINETIC = "kinetic-optimal"  # made for a data set, so not among the paths that a name alone gives


def parse_path(text: str, *, sigma_data: float, sigma_min: float, sigma_max: float) -> NoisePath:
    """The path that an option names: ``"vp"``, or ``"vp:beta_max=12"`` with options of its constructor.

    Paths that are made for a range of levels (edm, ve, trigflow) take the one given here, and trigflow
    ``sigma_data`` too, unless the text says otherwise.

    Args:
        text: A name of :data:`~distmatch.diffusion.paths.PATHS`, with options after a colon.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise level wanted.
        sigma_max: Largest noise level wanted.

    Raises:
        UserError: An unknown name or option, or an option that is no number.
    """
    name, _, rest = text.partition(":")
    if name == KINETIC:
        raise UserError(
            f"the {KINETIC} path is computed from data, so its name is not sufficient",
            fix=f"train a teacher with --path {KINETIC}: it stores its path and is sampled without "
            f"--path; in Python, kinetic_path_of(data) computes one",
        )
    check_name("noise path", name, PATHS)
    options: dict[str, float] = {}
    if name in ("edm", "ve"):
        options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    elif name == "trigflow":
        options = {"sigma_data": sigma_data, "rho_min": sigma_min, "rho_max": sigma_max}
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = float(value)
        except ValueError as error:
            raise UserError(
                f"cannot read the options of the path {name}",
                got=repr(part),
                expected="name=number, separated by commas",
                fix='write for example "vp:beta_max=12"',
            ) from error
    return noise_path(name, **options)


def path_to_dict(path: NoisePath) -> dict[str, Any]:
    """The JSON form of a path; :func:`path_from_dict` gives back an equal one.

    Raises:
        UserError: It was made from functions, which a file cannot hold.
    """
    if path.name not in (*PATHS, KINETIC):
        raise UserError(
            f"the {path.name} path cannot be saved",
            expected=f"one of {', '.join(PATHS)}, {KINETIC}",
            fix="save the denoiser with a path that has a name",
        )
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in path.options.items()}
    return {"name": path.name, "options": options}


def path_from_dict(values: Mapping[str, Any]) -> NoisePath:
    """The path that :func:`path_to_dict` described.

    Raises:
        UserError: An unknown name or option.
    """
    if values["name"] == KINETIC:
        return kinetic_path(**values["options"])
    return noise_path(str(values["name"]), **values["options"])
