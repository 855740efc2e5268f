"""Checkpoints written while training goes on, by one process or by all that share out the weights."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distmatch.base.ranks import Ranks, patience
from distmatch.training.checkpoint import write_checkpoint
from distmatch.training.packing import pack
from distmatch.training.shards import write_shards


class Saver:
    """Writes checkpoints in a thread, one at a time.

    A step waits only for the copy of the state. Weights that are shared out are written by all processes,
    each its own share; everything else by the first one.

    Args:
        folder: The ``checkpoints/`` folder.
        ranks: The processes, which all call every method in the same order.
        keep: Checkpoints that stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Its messages must not mix with those of the steps that go on meanwhile.
        self._group = None
        if ranks.size > 1:
            self._group = dist.new_group(backend=_cpu_backend(), timeout=patience(os.environ))

    def save(self, step: int, tree: Any, best: int | None) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Args:
            step: Finished steps.
            tree: The state, which is copied.
            best: Step of a checkpoint that stays besides the newest.

        Raises:
            UserError: The checkpoint before this one could not be written.
        """
        self.finish()
        tensors, structure = pack(tree)
        with torch.no_grad():
            tensors = {name: _copied(tensor) for name, tensor in tensors.items()}
        work = (step, tensors, structure, best)
        self._thread = threading.Thread(target=self._write, args=work, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Waits until what was begun is written.

        Raises:
            UserError: It could not be written; the checkpoints before it are whole.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Waits; what could not be written is raised by :meth:`finish` alone."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, step: int, tensors: dict[str, Tensor], structure: Any, best: int | None) -> None:
        try:
            shared: dict[str, Tensor] = {k: t for k, t in tensors.items() if isinstance(t, DTensor)}
            place = self._folder / f".step-{step:06d}.shards.tmp" if shared else None
            if place is not None:
                write_shards(place, shared, self._ranks, self._group)
            if self._ranks.main:
                whole = {name: t for name, t in tensors.items() if name not in shared}
                write_checkpoint(self._folder, step, whole, structure, self._keep, best, shards=place)
        except BaseException as error:
            self._error = error
        if self._group is not None:
            try:
                dist.barrier(self._group)  # nobody goes on to what is not there yet
            except RuntimeError as error:
                self._error = self._error or error


def _copied(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("cpu")
    return moved.clone() if moved.device == tensor.device else moved


def _cpu_backend() -> str:
    """The backend of the default group for messages between CPUs."""
    names = dict(part.split(":") for part in dist.get_backend_config().split(","))
    return names.get("cpu", dist.get_backend())
