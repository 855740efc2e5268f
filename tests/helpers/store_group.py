"""A process group of torch.distributed over one file: tests of several processes need no network interface.

gloo connects sockets, if only over the loopback interface, which some sandboxes do not allow.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future


def backend() -> str:
    """The name of the group, which is registered."""
    if not hasattr(dist.Backend, "FILES"):
        dist.Backend.register_backend("files", _StoreGroup, devices=["cpu"])
        # A group in Python has no place for these: they are made of those that it has.
        module: Any = dist
        module.all_gather_single = module.all_gather_into_tensor = _all_gather_single
        module.reduce_scatter_single = module.reduce_scatter_tensor = _reduce_scatter_single
        module.gather_object, module.scatter_object_list = _gather_object, _scatter_object_list
        functional: Any = funcol
        functional.all_gather_single = functional.all_gather_tensor = _gathered_along
        functional.all_reduce = _all_reduced
    return "files"


def _all_gather_single(output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    parts = [torch.empty_like(input) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, input.contiguous(), group=group)
    output.copy_(torch.cat(parts).view_as(output))
    return _done([output]) if async_op else None


def _reduce_scatter_single(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    total = input.clone()
    dist.all_reduce(total, op, group=group)
    output.copy_(total.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(output))
    return _done([output]) if async_op else None


def _gathered_along(own: Tensor, gather_dim: int, group: Any, tag: str = "") -> Tensor:
    mesh, dim = group
    parts = [torch.empty_like(own) for _ in range(mesh.size(dim))]
    dist.all_gather(parts, own.contiguous(), group=mesh.get_group(dim))
    return torch.cat(parts, gather_dim)


def _all_reduced(own: Tensor, reduceOp: str, group: Any, tag: str = "") -> Tensor:
    mesh, dim = group
    total = own.detach().clone()
    dist.all_reduce(total, getattr(dist.ReduceOp, reduceOp.upper()), group=mesh.get_group(dim))
    return total


def _gather_object(
    obj: Any, object_gather_list: list[Any] | None = None, group: Any = None, **_: Any
) -> None:
    every = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, obj, group=group)
    if object_gather_list is not None:
        object_gather_list[:] = every


def _scatter_object_list(
    scatter_object_output_list: list[Any],
    scatter_object_input_list: list[Any] | None = None,
    group: Any = None,
    **_: Any,
) -> None:
    whole: list[Any] = [scatter_object_input_list]
    dist.broadcast_object_list(whole, src=0, group=group)
    scatter_object_output_list[0] = whole[0][dist.get_rank(group)]


class _StoreGroup(dist.ProcessGroup):
    """Collectives by values in a store: each rank writes its own and reads all, in the order of the ranks."""

    def __init__(self, store: dist.Store, rank: int, size: int, _timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._store, self._rank, self._size, self._count = store, rank, size, 0
        self._name = ""

    def getBackendName(self) -> str:
        return "files"

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the shape and dtype of its own."""
        own = tensor.detach().contiguous().clone()
        self._store.set(f"{self._count}/{self._rank}", own.flatten().view(torch.uint8).numpy().tobytes())
        found = [
            own if rank == self._rank else self._read(f"{self._count}/{rank}", own)
            for rank in range(self._size)
        ]
        self._count += 1
        return found

    def _read(self, key: str, like: Tensor) -> Tensor:
        for _ in range(50):  # others are nearly as far; a file that waits looks only every 10 ms
            if self._store.check([key]):
                break
            time.sleep(2e-4)
        value = bytearray(self._store.get(key))
        return torch.frombuffer(value, dtype=torch.uint8).view(like.dtype).view(like.shape) if value else like

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

    def barrier(self, opts: Any = None) -> dist.Work:
        """Waits for all ranks."""
        return _done(self._gathered(torch.zeros(1)))


def _done(result: Any) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)
