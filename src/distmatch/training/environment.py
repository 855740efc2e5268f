"""What a run ran on: the content of env.json, and the peak memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import torch

_PACKAGES = ("distmatch", "torch", "numpy", "scipy", "scikit-learn")
_GIT_SECONDS = 5.0


def environment() -> dict[str, Any]:
    """The content of ``env.json``: versions, devices, git commit, command line, time; no host or user name.

    Returns:
        A dict that JSON can hold. ``git_commit`` is that of the checkout around the working folder, ending in
        ``-dirty`` where files were changed, or None. ``time`` is UTC in ISO 8601.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
    }


def peak_memory() -> dict[str, int | None]:
    """Peak memory of this process so far, in bytes.

    Returns:
        ``cpu``, the largest resident set, and ``cuda``, the most that tensors took on one accelerator (None
        without one).
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    cuda = None
    if torch.cuda.is_available():
        cuda = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return {"cpu": peak * unit, "cuda": cuda}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            capability = f"{card.major}.{card.minor}"
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": card.name,
                    "memory_bytes": card.total_memory,
                    "capability": capability,
                    "cuda": torch.version.cuda,
                }
            )
    return devices


def _git_commit() -> str | None:
    """The commit around the working folder; None without git or a checkout, or when git takes too long."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks, git leaves the index alone: another git may be at work in the same checkout.
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return answer.stdout.strip() or None
