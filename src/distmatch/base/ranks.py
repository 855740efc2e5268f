"""The processes that train one run together, and what they tell each other.

Each batch is of all ranks together; rank i of n holds the i-th of n equal runs of its rows. Random numbers
are drawn for the whole batch on every rank, from a generator in the same state, and each keeps its own rows.
So a sample's noise depends on seed, stream, step and its place in the whole batch, and not on the number of
ranks. A mean over the rows of a rank is a share of the mean over all: gradients are averaged over the ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmatch.base.errors import UserError

TIMEOUT = "DISTMATCH_TIMEOUT"
"""Environment variable: seconds after which processes give up a silent one."""
_SECONDS = 600.0
_BUCKET = 32 << 20  # bytes of gradients that are sent at a time


@dataclass(frozen=True)
class Ranks:
    """One of ``size`` processes; by default the only one, which communicates with nobody.

    Attributes:
        index: The number of this process, from 0.
        size: How many there are.
    """

    index: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.index == 0

    def share(self, n: int, what: str = "--batch") -> int:
        """The rows that a rank holds of ``n``.

        Args:
            n: Rows of all ranks together.
            what: What the number is, for the message.

        Raises:
            UserError: The ranks cannot hold the same number.
        """
        if n % self.size:
            raise UserError(
                "a batch is shared out evenly among the processes",
                got=f"{n} ({what}) with {self.size} processes",
                expected=f"a multiple of {self.size}",
                fix="change --batch, or start another number of processes",
            )
        return n // self.size

    def rows(self, n: int, what: str = "--batch") -> slice:
        """The rows of this rank among ``n`` of all; see :meth:`share`."""
        own = self.share(n, what)
        return slice(self.index * own, (self.index + 1) * own)

    def draw(self, n: int, sample: Callable[[int], Tensor]) -> Tensor:
        """This rank's ``n`` rows of random numbers.

        Args:
            n: Rows of this rank.
            sample: Draws that many rows, from a generator that is in the same state on all ranks.
        """
        drawn = sample(n * self.size)
        return drawn if self.size == 1 else drawn[self.index * n : (self.index + 1) * n]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks of tensors of one shape."""
        return x if self.size == 1 else self.sum(x) / self.size

    def norm(self, gradient: Tensor) -> Tensor:
        """The norm over all rows of the gradient of a mean over all rows.

        Args:
            gradient: That of the mean over the rows of this rank, with respect to them.
        """
        norm = gradient.norm()
        return norm if self.size == 1 else self.sum(norm.square()).sqrt() / self.size

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks, each of which has as many; without history."""
        if self.size == 1:
            return x.detach()
        own = x.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers; the ranks wait for each other, not for their devices."""
        if self.size == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def from_main(self, flag: bool) -> bool:
        """The flag of rank 0."""
        return bool(self.largest(int(flag and self.main)))

    def wait(self) -> None:
        """Waits until all ranks are here."""
        self.largest(0)

    def require_same(self, what: str, text: str) -> None:
        """Refuses ranks that were started with something else than rank 0.

        Args:
            what: What must be the same, for the message.
            text: What it is here.

        Raises:
            UserError: It is not the same on all ranks; raised on all of them.
        """
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()))
        all_digests = self.gather(digest[None])
        if others := [
            rank for rank in range(self.size) if not torch.equal(all_digests[rank], all_digests[0])
        ]:
            raise UserError(
                f"all processes of a run need the same {what}",
                got=f"another one in process {', '.join(map(str, others))} than in process 0",
                fix="start all of them by one torchrun command, from the same installation",
            )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the values of rank 0 into the tensors of the others."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of whole parameters over ranks; those of sharded ones are averages already.

        Once for each step of an optimizer, however many passes and calls of ``backward`` made them. (The
        reducer of DistributedDataParallel would send them after each, and expects every parameter to be used
        in it, which early exits and frozen phases do not do.)
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            grad = parameter.grad
            if grad is None or isinstance(grad, DTensor):
                continue
            if bucket and (grad.dtype != bucket[0].dtype or sum(g.nbytes for g in bucket) >= _BUCKET):
                self._average(bucket)
                bucket = []
            bucket.append(grad)
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


ALONE = Ranks()
"""The only process."""


def lost_process(error: BaseException) -> bool:
    """Whether an error is that another process has died or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "connection closed by peer", "nccl", "connection reset by peer", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def patience(environ: Mapping[str, str]) -> timedelta:
    """The time after which a process gives up one that does not answer; every group has to be made with it.

    Raises:
        UserError: The environment variable is no length of time.
    """
    try:
        seconds = float(environ.get(TIMEOUT) or _SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise UserError(
            f"{TIMEOUT} is no length of time",
            got=environ[TIMEOUT][:80],
            expected="seconds, for example 600",
            fix="correct it, or unset it",
        )
    return timedelta(seconds=seconds)


def may_branch_on(values: Tensor) -> bool:
    """Whether the number of network calls may depend on values: they are on a CPU, of the only process.

    Reading them elsewhere would synchronize with the device, and processes that share out their weights
    gather them in each call: they must make the same ones.
    """
    return values.device.type == "cpu" and joined().size == 1


_APART: ContextVar[bool] = ContextVar("apart", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """A context in which :func:`joined` leaves out the other processes, for what each does on its own."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def joined() -> Ranks:
    """This process among those of its default process group; alone without one."""
    if _APART.get() or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())
