"""A process group of torch.distributed over one file: tests of several processes need no network interface.

gloo connects sockets, if only over the loopback interface, which some sandboxes do not allow.
"""

from __future__ import annotations

import io
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future


def backend() -> str:
    """The name of the group, which is registered."""
    if not hasattr(dist.Backend, "FILES"):
        dist.Backend.register_backend("files", _StoreGroup, devices=["cpu"])
    return "files"


class _StoreGroup(dist.ProcessGroup):
    """Collectives by values in a store: each rank writes its own and reads all, in the order of the ranks."""

    def __init__(self, store: dist.Store, rank: int, size: int, _timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._store, self._rank, self._size, self._count = store, rank, size, 0

    def getBackendName(self) -> str:
        return "files"

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        buffer = io.BytesIO()
        torch.save(tensor.detach().contiguous(), buffer)
        self._store.set(f"{self._count}/{self._rank}", buffer.getvalue())
        keys = [f"{self._count}/{rank}" for rank in range(self._size)]
        self._count += 1
        return [torch.load(io.BytesIO(self._store.get(key)), weights_only=True) for key in keys]

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        """The sum, or with ``ReduceOp.AVG`` the mean, MAX the largest, in place."""
        kind = getattr(options, "reduceOp", dist.ReduceOp.SUM)
        reductions = {"SUM": lambda x: x.sum(0), "AVG": lambda x: x.mean(0), "MAX": lambda x: x.amax(0)}
        reduce = next(f for name, f in reductions.items() if kind == getattr(dist.ReduceOp, name))
        for tensor in tensors:
            tensor.copy_(reduce(torch.stack(self._gathered(tensor))))
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        """The tensor of rank ``rootRank``."""
        for tensor in tensors:
            tensor.copy_(self._gathered(tensor)[getattr(options, "rootRank", 0)])
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], _options: Any = None) -> dist.Work:
        """The tensors of all ranks."""
        for given, tensor in zip(outputs, inputs, strict=True):
            for output, value in zip(given, self._gathered(tensor), strict=True):
                output.copy_(value)
        return _done(outputs)

    def barrier(self, _options: Any = None) -> dist.Work:
        """Waits for all ranks."""
        return _done(self._gathered(torch.zeros(1)))


def _done(result: Any) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)
