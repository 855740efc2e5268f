"""Tensors that processes share out, on disk: safetensors by torch.distributed.checkpoint, never its pickles.

Each process writes the file of its shares, whose header says which part of each tensor they are. Any number
of processes reads them, in any layout, each only what it needs; a single one too.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from distmatch.base.errors import UserError, cause
from distmatch.base.ranks import Ranks

Layout = Callable[[str, torch.Size], Tensor | None]
"""By name and shape of a tensor of a checkpoint: one in the layout that it is to have; None: a plain one."""


def write_shards(
    folder: Path, tensors: dict[str, Tensor], ranks: Ranks, group: dist.ProcessGroup | None
) -> None:
    """Writes tensors that processes share out, each its own shares.

    Args:
        folder: Made anew.
        tensors: The same names on all processes.
        ranks: The processes.
        group: For messages that do not mix with others.
    """
    if ranks.main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier(group)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group)


def read_shards(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """Reads what :func:`write_shards` wrote.

    Args:
        folder: The folder, whose files are known to be whole.
        layout: The layout of each tensor; plain ones are read whole.

    Raises:
        UserError: The files are not shares of tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone
            reader = HuggingFaceStorageReader(str(folder))
            found: dict[str, Any] = reader.read_metadata().state_dict_metadata
            tensors: dict[str, Tensor] = {}
            for name, about in found.items():
                like = layout(name, about.size)
                dtype = about.properties.dtype
                tensors[name] = torch.empty(about.size, dtype=dtype) if like is None else like
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, ValueError, KeyError, AttributeError, OSError, AssertionError) as error:
        raise UserError(
            f"{folder} is no part of a checkpoint",
            got=cause(error),
            expected="files of shares as distmatch writes them",
            fix="use another checkpoint",
        ) from error
    return tensors


def laid_out(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor in the layout of another one: of shares, this process's; otherwise as it is."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(like.device), mesh, like.placements, src_data_rank=None)
