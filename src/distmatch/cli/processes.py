"""One command in several processes: the first one speaks, and an error is said once."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta

from torch import distributed as dist

from distmatch.base.errors import LostProcess, UserError
from distmatch.base.progress import quietly
from distmatch.base.ranks import Ranks, lost_process
from distmatch.cli.surroundings import rank_of_several
from distmatch.training.processes import NoSuchRank, check_launch, process_group

_PATIENCE = 5.0  # seconds for which a process that failed waits for the first one to say why
_CUT = 20.0  # after which it takes the network to the first one for cut
_FAREWELL = 10.0  # for which the first one waits for the others before it ends: the launcher kills those left


@contextmanager
def together(
    environ: Mapping[str, str],
    say: Callable[[BaseException], int],
    code_of: Callable[[BaseException], int],
) -> Iterator[None]:
    """A context for a command that several processes carry out.

    All but the first one are silent. An error that the first one has too is left to it; another one is said
    by the first process that meets it.

    Args:
        environ: The environment, with what torchrun puts there.
        say: Tells the user of an error; returns its exit code.
        code_of: The exit code of an error.

    Raises:
        UserError: The processes do not find each other.
        SystemExit: After an error, on all processes.
    """
    try:
        if not dist.is_initialized():
            check_launch(environ)
    except UserError as error:
        if rank_of_several(environ) and not isinstance(error, NoSuchRank):
            raise SystemExit(2) from None  # the first process has the same environment, and says it
        raise
    started = ExitStack()
    try:
        ranks = started.enter_context(process_group(environ))
    except UserError as error:
        if rank_of_several(environ) and isinstance(error.__cause__, dist.DistStoreError):
            raise SystemExit(2) from None  # the first process, which was reached, waits for the same others
        raise
    with started:
        if ranks.size == 1:
            yield
            return
        try:
            with ExitStack() as silence:
                if not ranks.main:
                    silence.enter_context(quietly())
                    silence.enter_context(warnings.catch_warnings())
                    warnings.simplefilter("ignore")
                    silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
                yield
        except SystemExit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise SystemExit(_ended(ranks, _explained(error), say, code_of)) from error


def _explained(error: BaseException) -> BaseException:
    """The error, or in its place that of a process that is gone."""
    if not lost_process(error):
        return error
    return LostProcess(
        "another process of this run has died or does not answer",
        got=str(error).splitlines()[0][:200],
        fix="look for its own message, or for what killed it; then continue with --resume",
    )


def _ended(
    ranks: Ranks,
    error: BaseException,
    say: Callable[[BaseException], int],
    code_of: Callable[[BaseException], int],
) -> int:
    """Says an error unless another process does; returns the exit code."""
    store = None
    with suppress(RuntimeError, ValueError):  # or it is lost with the process that had it
        store = dist.distributed_c10d._get_default_store()
    speaks: list[bool] = []
    asking = threading.Thread(target=lambda: speaks.append(_speaks(store, ranks, error)), daemon=True)
    asking.start()
    asking.join(_CUT)
    code = say(error) if not speaks or speaks[0] else code_of(error)
    if not speaks:
        # The store is behind a network that is cut; all that would have to be closed waits for many minutes.
        sys.stderr.flush()
        os._exit(code)
    with suppress(RuntimeError, ValueError, KeyboardInterrupt):
        if store is not None and ranks.main:
            store.set("failed", "")
            # Those that wait for this one notice now, and can still ask its store. (Not where weights are
            # shared out: the networks hold the connections until the end.)
            closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
            closing.start()
            closing.join(_FAREWELL)
            until = time.monotonic() + _FAREWELL
            while store.add("gone", 0) < ranks.size - 1 and time.monotonic() < until:
                time.sleep(0.02)
        elif store is not None:
            store.add("gone", 1)
    return code


def _speaks(store: dist.Store | None, ranks: Ranks, error: BaseException) -> bool:
    """Whether this process is the one that says what is wrong."""
    with suppress(RuntimeError, ValueError):
        if store is not None and not ranks.main:
            store.wait(["failed"], timedelta(seconds=_PATIENCE))
    with suppress(RuntimeError, ValueError):
        return store is None or store.add("said", 1) == 1
    # The first process is gone, and has said so or was killed: one of each machine says it.
    one = ranks.index == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    return one or not isinstance(error, LostProcess)
