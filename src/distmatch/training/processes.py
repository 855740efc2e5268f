"""The processes of one launch: how they find each other, and what they must have in common."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE, Ranks, joined, patience
from distmatch.base.version import __version__
from distmatch.training.config_format import config_text
from distmatch.training.parallel import check_parallel

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_MPIRUN = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}


class NoSuchRank(UserError):
    """The number of this process is none of the launch, of which the others know nothing."""


@contextmanager
def process_group(environ: Mapping[str, str]) -> Iterator[Ranks]:
    """A context in which the processes that torchrun started are one process group.

    Args:
        environ: The environment, with what torchrun or mpirun puts there; without, the process is alone.

    Raises:
        UserError: See :func:`check_launch`; or the processes do not find each other.
    """
    if dist.is_available() and dist.is_initialized():  # by the program that calls us
        yield joined()
        return
    if not check_launch(environ):
        yield ALONE
        return
    environ = _as_torchrun(environ)
    device, backend = None, "gloo"
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            device = local_device(kind.type, environ)
            backend = f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind)}"
            torch.accelerator.set_device_index(device.index)
    try:
        dist.init_process_group(
            backend,
            timeout=patience(environ),
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "the processes of this launch do not find each other",
            got=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            expected=f"{environ['WORLD_SIZE']} processes that reach {environ['MASTER_ADDR']} at port "
            f"{environ['MASTER_PORT']}",
            fix="start all of them with torchrun, and check the network between the machines",
        ) from error
    try:
        yield joined()
    finally:
        if dist.is_initialized():  # a command that failed may have left it already
            dist.destroy_process_group()


def check_launch(environ: Mapping[str, str]) -> bool:
    """Whether several processes were started, by what a launcher puts into the environment.

    Raises:
        UserError: They were, and it is not known how they find each other, or how long they wait.
    """
    environ = _as_torchrun(environ)
    if environ.get("WORLD_SIZE", "1") in ("", "0", "1") and environ.get("RANK", "0") in ("", "0"):
        return False
    given = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if environ.get(name)}
    numbers = {name: int(v) if v.isdecimal() and len(v) < 10 else -1 for name, v in given.items()}
    outside = numbers.get("RANK", 0) >= numbers.get("WORLD_SIZE", 10**9) >= 0
    if outside or min(numbers.values()) < 0 or not 0 < numbers.get("MASTER_PORT", 1) < 65536:
        raise (NoSuchRank if outside else UserError)(
            "the environment of this launch contradicts itself",
            got=", ".join(f"{name}={value:.40}" for name, value in given.items()),
            expected="a RANK from 0 to WORLD_SIZE - 1, and a port from 1 to 65535",
            fix="start all processes with torchrun, or unset these variables to run in one process",
        )
    if missing := [name for name in _NEEDED if not environ.get(name)]:
        raise (NoSuchRank if "WORLD_SIZE" in missing else UserError)(
            "several processes were started, and nothing says how they find each other",
            got=f"no {', '.join(missing)} in the environment",
            expected="what torchrun sets",
            fix="start with: torchrun --nproc-per-node N -- $(which distmatch) VERB ...; with mpirun, name "
            "the host of process 0 by -x MASTER_ADDR=HOST -x MASTER_PORT=29500",
        )
    patience(environ)
    return True


def _as_torchrun(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with the variables of mpirun under the names that torchrun uses."""
    own = {name: value for name, value in environ.items() if value}
    return {name: own[theirs] for name, theirs in _OF_MPIRUN.items() if theirs in own} | own


def local_device(kind: str, environ: Mapping[str, str]) -> torch.device:
    """The accelerator of this process among those of its machine.

    Raises:
        UserError: There are fewer than processes.
    """
    index, count = int(environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if index >= count:
        raise UserError(
            "each process of a machine has a device of its own",
            got=f"process {index} of this machine, which has {count} of {kind}",
            expected=f"{count} processes or fewer",
            fix=f"start torchrun with --nproc-per-node {count}, or pass --device cpu",
        )
    return torch.device(kind, index)


def start_together(verb: str, options: Any, *, fresh: bool = True) -> Ranks:
    """The processes of a run, which is refused unless all were started alike.

    Args:
        verb: The verb.
        options: Its options, with :class:`~distmatch.training.options.RunOptions` as ``run``.
        fresh: Whether it begins, and is not resumed.

    Raises:
        UserError: Options or versions differ between them, or the batch cannot be shared out.
    """
    ranks = joined()
    if ranks.size > 1:
        versions = f"{__version__} {torch.__version__} {platform.python_version()}"
        ranks.require_same("options and versions", config_text(verb, options) + versions)
        ranks.share(options.run.batch)
    check_parallel(options.run, ranks, fresh=fresh)
    return ranks
