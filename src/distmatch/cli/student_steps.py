"""The steps of a student in a dry run: times, noise levels, and the options that have no part in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmatch.interop.pipelines.steps import times_of
from distmatch.methods.construct import idle_settings
from distmatch.methods.settings import NetworkSettings, Settings


def steps_of(teacher: Any, sigmas: Sequence[float]) -> dict[str, Any]:
    """The noise levels of a student's calls, and the same as times of the teacher's path with its shift.

    Args:
        teacher: The teacher; one without a path has no times.
        sigmas: The levels, decreasing.
    """
    path, shift = getattr(teacher, "path", None), getattr(teacher, "shift", None)
    if path is None or shift is None:
        return {"levels": list(sigmas)}
    times = [times_of(path, sigma) for sigma in sigmas]
    # The shift is of times between 0 and 1; a table of timesteps has none.
    return {"levels": list(sigmas), "times": times, **({"shift": shift} if path.t_max <= 1 else {})}


def steps_line(steps: dict[str, Any]) -> str:
    """The same for people."""
    levels = ", ".join(f"{level:.4g}" for level in steps["levels"])
    number = len(steps["levels"])
    count = f"{number} step{'s' if number > 1 else ''}"
    if "times" not in steps:
        return f"student     {count}, at noise level{'s' if number > 1 else ''} {levels}"
    times = ", ".join(f"{time:.6g}" for time in steps["times"])
    shift = f", shift {steps['shift']:.4g}" if "shift" in steps else ""
    return f"student     {count}, at time{'s' if number > 1 else ''} {times}{shift}, noise {levels}"


def without_effect(own: Settings, teacher: Any) -> set[str]:
    """Settings at their defaults that do nothing in a run; others of them are refused."""
    names = set(idle_settings(own))
    if isinstance(own, NetworkSettings) and getattr(teacher, "shift", None) is not None:
        if own.student_sigma == type(own).student_sigma:
            names.add("student_sigma")  # the student starts at the highest level
        if getattr(own, "noise_distribution", "auto") == "auto":
            names.add("noise_rho")  # of levels that are not uniform in time
    return names
