"""`distmatch VERB`: finds the verb, turns errors into messages and exit codes.

Exit codes: 0 done, 2 the user's mistake, 1 anything else, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext

from distmatch.base.checks import check_name
from distmatch.base.errors import LostProcess, Terminated, UserError
from distmatch.base.memory import out_of_memory
from distmatch.cli.answer import print_json, printed_warnings
from distmatch.cli.surroundings import (
    TOGETHER,
    discard,
    prepare_streams,
    rank_of_several,
    several_processes,
    sigterm_as_interrupt,
)

_RUNS = ("demo", "train", "distill", "compare")  # verbs that write nothing before they have a run folder
VERBS = {
    "demo": ("distmatch.cli.demo", "train, distil, measure and report on digits, in minutes"),
    "prepare": ("distmatch.cli.prepare", "read data of any size into a store to train on"),
    "train": ("distmatch.cli.train", "train a diffusion teacher"),
    "distill": ("distmatch.cli.distill", "distil a teacher into a one-step student"),
    "compare": ("distmatch.cli.compare", "distil with several methods at the same budget and compare them"),
    "sample": ("distmatch.cli.sample", "draw samples from a teacher or a student"),
    "evaluate": ("distmatch.cli.evaluate", "measure samples or a run against real data"),
    "report": ("distmatch.cli.report", "write the HTML page of a run"),
    "export": ("distmatch.cli.export", "export a model"),
    "doctor": ("distmatch.cli.doctor", "check this machine and installation"),
}


def usage() -> str:
    """The help text of `distmatch` itself."""
    lines = ["usage: distmatch VERB [options]", "", "Distil a diffusion model into a one-step generator.", ""]
    lines += [f"  {verb:10}{text}" for verb, (_, text) in VERBS.items()]
    lines += [
        "",
        "  distmatch VERB --help shows the common options of a command, --help-all every option.",
        "",
        "examples:",
    ]
    lines += ["  distmatch demo", "  distmatch train --data digits --out runs/teacher"]
    lines += ["  distmatch distill --teacher runs/teacher --divergence js --out runs/js"]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from distmatch.base.version import __version__

        print(f"distmatch {__version__}")
        return 0
    arguments = [a for a in argv[1:] if a != "--debug"]
    rank = rank_of_several(os.environ)
    if rank and argv[0] not in TOGETHER:
        return 2  # the first process says why
    with printed_warnings():
        try:
            with _launched(argv, rank), sigterm_as_interrupt():
                return _carry_out(argv[0], arguments)
        except BrokenPipeError:
            # The reader of our output has gone (for example `| head`): nothing is left to say to it.
            discard(sys.stdout.fileno())
            return 1
        except SystemExit as stop:  # after --help, or where a verb has said all
            return stop.code if isinstance(stop.code, int) else 2
        except (Exception, KeyboardInterrupt) as error:
            return _say(error, argv)


def _say(error: BaseException, argv: list[str]) -> int:
    """Tells the user what went wrong; returns the exit code."""
    if "--debug" in argv and isinstance(error, Exception):
        traceback.print_exception(error)
    text, parts, code = _failure(error, argv[0])
    rank = rank_of_several(os.environ)
    print(f"distmatch {argv[0]}{f' (process {rank})' if rank else ''}: {text}", file=sys.stderr)
    if "--json" in argv and not rank:
        print_json({"verb": argv[0], "error": parts, "exit_code": code})
    return code


def _launched(argv: list[str], rank: int | None) -> AbstractContextManager[None]:
    """The context of a command: one of the processes of a launch, where there is one.

    Raises:
        UserError: The verb is not for several processes.
    """
    if rank is None:
        return nullcontext()
    check_name("verb", argv[0], VERBS)
    if argv[0] not in TOGETHER:
        raise several_processes(argv[0])
    from distmatch.cli.processes import together

    return together(os.environ, lambda error: _say(error, argv), lambda error: _failure(error, argv[0])[2])


def _carry_out(verb: str, arguments: list[str]) -> int:
    check_name("verb", verb, VERBS)
    importlib.import_module(VERBS[verb][0]).run(arguments)
    sys.stdout.flush()
    return 0


def _failure(error: BaseException, verb: str) -> tuple[str, dict[str, str], int]:
    """What to say of an error: the message, its parts, and the exit code."""
    theirs = error if isinstance(error, UserError) else _of_the_machine(error)
    if theirs is not None:
        return str(theirs), theirs.parts, 1 if isinstance(theirs, LostProcess) else 2
    if isinstance(error, KeyboardInterrupt):
        code = 143 if isinstance(error, Terminated) else 130
        if error.args:  # a run on disk: the command that continues it
            what, fix = "interrupted", str(error.args[0])
            return f"{what}; {fix}", {"what": what, "fix": fix}, code
        left = "no run was written" if verb in _RUNS else "no incomplete file is left"
        return f"interrupted; {left}", {"what": f"interrupted; {left}"}, code
    what = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
    return what, {"what": what}, 1


def _of_the_machine(error: BaseException) -> UserError | None:
    """The message for what the user's machine refuses wherever it is met: access, space, memory."""
    refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
    if memory := out_of_memory(error):
        return memory
    if isinstance(error, OSError) and error.errno in refused:
        place = f" {error.filename}" if error.filename else ""
        fix = "check the path, its permissions and the free space"
        return UserError(f"cannot use{place or ' a file'}", got=error.strerror, fix=fix)
    return None


def entry() -> None:
    """The console script."""
    prepare_streams()
    if rank_of_several(os.environ) is not None:
        # Read by torch when it is imported; otherwise it prints pages about every lost connection.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # said already, or nobody reads it
        discard(sys.stdout.fileno())
    if code in (130, 143):  # an import that was cut in half can crash the interpreter as it takes itself down
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
