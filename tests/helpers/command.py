"""Running the command line inside the test process, and seeing what it did to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmatch.cli.main import main

TINY = "--net mlp --width 40 --depth 1"
SHORT = "--steps 6 --batch 32"
METRICS = {
    *("fd", "kid", "mmd", "precision", "recall", "density", "coverage", "vendi"),
    *("authentic", "memorized"),
}
SPEED = {"nfe", "seconds_per_1000"}


@dataclass(frozen=True)
class Answer:
    """What one command line came to."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; fails where there is anything else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


def command(line: str) -> Answer:
    """`distmatch LINE`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    return Answer(code, out.getvalue(), err.getvalue())


def done(line: str) -> Answer:
    """`distmatch LINE`, which has to work."""
    answer = command(line)
    assert answer.code == 0, answer.err
    return answer


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder``, hidden ones too, with a hash of what is in it."""
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def weights(run: str | Path) -> bytes:
    """The file of the finished model."""
    return (Path(run) / "model" / "model.safetensors").read_bytes()


def checkpoints(run: str | Path) -> list[str]:
    """Names of a run's checkpoints, temporary ones included."""
    folder = Path(run) / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
