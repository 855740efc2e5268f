"""Hands made command lines to the option parser of every verb; what a verb would do is not begun.

python benchmarks/fuzz/command_line.py --cases 20000 --seconds 480
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Case, command_line, scratch

from distmatch.base.errors import UserError
from distmatch.cli import parse
from distmatch.cli.main import VERBS, main
from distmatch.methods.table import METHODS

VALUES = (
    *("", "0", "-1", "1", "1e308", "-1e999", "nan", "1.5", "9" * 400, "0x10", "1_000", "true", "None"),
    *("none", "auto", "js", "kl", "alpha:1e400", "alpha:x", "gjs:-1", "skew_kl:nan", "vp:beta_max=-1"),
    *("vp:x=1", "cpu", "cuda:99999999999", "a b", "a\0b", "\udcff", "--", "-", "-n", "@file", "x" * 100_000),
    *("latest", "--steps", "/dev/zero", "/proc/self/mem", "..", "f-distill:js[gan_weight=", "dmd2,dmd2"),
    *("a=b=c", "5m", "1e999 steps", "9" * 5000, "[" * 5000, "sid[lr=" + "[" * 5000, "sid[lr=" + "9" * 5000),
)


class Stopped(Exception):
    """Raised where a verb has its options and would begin."""


class CommandLines:
    """Makes and checks the cases."""

    def __init__(self, folder: Path | None = None, put: Callable[[Any, str, Any], None] = setattr) -> None:
        os.chdir(folder or scratch())
        Path("config.toml").write_text('verb = "train"\n[run]\nsteps = 3\n')
        Path("run").mkdir()
        Path("run/config.toml").write_text('verb = "distill"\nteacher = "x"\n')
        self.flags = {verb: flags_of(verb) for verb in VERBS}
        for name in ("parse", "parse_run"):
            replace_everywhere(name, stopping(getattr(parse, name)), put)

    def make(self, rng: random.Random, number: int) -> Case:
        """A verb with one to six options, as JSON."""
        verb = rng.choice(list(VERBS)) if rng.random() < 0.98 else rng.choice(VALUES)
        flags = self.flags.get(verb) or ["--x"]
        line = [verb]
        for _ in range(rng.randint(1, 6)):
            flag = rng.choice(flags)
            if rng.random() < 0.1:
                flag = rng.choice((flag[:-1], flag + "x", flag.upper(), "--config", "--resume", "--help"))
            value = rng.choice(VALUES)
            line += (
                [flag, value] if rng.random() < 0.8 else [flag] if rng.random() < 0.5 else [f"{flag}={value}"]
            )
            if rng.random() < 0.1:
                line.append(rng.choice(VALUES))
        if rng.random() < 0.2:
            line += ["--config", rng.choice(("config.toml", "run/config.toml", "absent"))]
        if rng.random() < 0.1:
            line += ["--out", "run", "--resume"]
        return Case(verb[:20], json.dumps(line).encode())

    def check(self, case: Case) -> None:
        """Runs a line up to where the verb would begin; an internal error is a failure."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(json.loads(case.content))
        if code not in (0, 2) and "Stopped" not in err.getvalue():
            raise RuntimeError(f"exit code {code}: {err.getvalue()[:300]}")
        if code == 2:
            raise UserError(err.getvalue()[:300])


def stopping(real: Any) -> Any:
    """A parser that stops when it has its options."""

    def call(*args: Any, **keywords: Any) -> Any:
        real(*args, **keywords)
        raise Stopped

    return call


def replace_everywhere(name: str, function: Any, put: Callable[[Any, str, Any], None]) -> None:
    """Puts a function in the place of one of ``cli/parse.py``, in the modules of all verbs."""
    for module, _ in VERBS.values():
        found = importlib.import_module(module)
        if hasattr(found, name):
            put(found, name, function)


def flags_of(verb: str) -> list[str]:
    """The flags of a verb, from the fields of the dataclasses that its module defines or takes."""
    module = importlib.import_module(VERBS[verb][0])
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    ]
    names: set[str] = set()
    if verb in ("distill", "compare"):
        settings = {name for method in METHODS.values() for name in method.options()}
        names |= {"--" + name.replace("_", "-") for name in settings}
    while kinds:
        for field in dataclasses.fields(kinds.pop()):
            names.add("--" + field.name.replace("_", "-"))
            if dataclasses.is_dataclass(field.default_factory):
                kinds.append(field.default_factory)
    return sorted(names | {"--out", "--seed", "--json"})


def run() -> int:
    """Runs the cases that the command line asks for."""
    cases = CommandLines()
    return command_line(__doc__ or "", cases.make, cases.check, limit_s=5.0)


if __name__ == "__main__":
    sys.exit(run())
