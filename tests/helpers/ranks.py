"""Methods trained by several processes that share a batch, and by one that has it alone."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distmatch.base.ranks import ALONE, Ranks
from distmatch.data.batches import Batch
from distmatch.methods.state import DistillState
from distmatch.training.options import RunOptions
from distmatch.training.parallel import share_out
from tests.helpers.small import batch, distiller, network_teacher
from tests.helpers.store_group import backend

CLASSES, ROWS = 2, 16


@dataclass(frozen=True)
class Case:
    """A method and its settings.

    Attributes:
        name: What the results are called.
        method: The method.
        settings: Fields of its settings.
        steps: Training steps.
        parallel: How the processes share the work.
        shard_size: Processes of a group.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 20
    parallel: Any = "ddp"
    shard_size: int = 0


CASES: dict[str, dict[str, Any]] = {
    "f-distill": {"num_steps": 2, "gan_weight": 0.1, "warmup_steps": 2},
    "dmd": {"pairs": 64, "pair_steps": 3},
    "disback": {"backtrack": 2, "backtrack_degrade_steps": 1, "backtrack_interval": 1},
    "ctm": {"gan_weight": 0.1, "gan_after": 0.0},
    "rcm": {"dmd_after": 0.0},
    "mmd": {"mmd_features": "teacher", "num_steps": 2},
    "imm": {"imm_particles": 2},
    "dpm-ot": {"bank": 8, "bank_steps": 3},
}
"""Settings under which every part of a method acts within a few steps."""


def rows_of(whole: Batch, ranks: Ranks) -> Batch:
    """The rows of a rank."""
    rows = ranks.rows(len(whole.x))
    return Batch(whole.x[rows], whole.conditioning.index(rows))


def trained(case: Case, ranks: Ranks = ALONE) -> tuple[DistillState, list[dict[str, Tensor]]]:
    """The state after the steps of a case, and what each step reported."""
    teacher = network_teacher(CLASSES)
    method = distiller(teacher, method=case.method, total_steps=case.steps, ranks=ranks, **case.settings)
    state = method.init(0)
    run = RunOptions(parallel=case.parallel, shard_size=case.shard_size)
    share_out([getattr(method, "base", method).context.teacher], state, run, torch.device("cpu"))
    averaged(state)  # a pass before the steps, whose weights must not be those of passes after them
    return state, [method.step(state, rows_of(batch(s, CLASSES, ROWS), ranks)) for s in range(case.steps)]


@torch.no_grad()
def averaged(state: DistillState) -> Tensor:
    """What the average makes of a batch."""
    network: Any = state.ema.module
    if not hasattr(network, "sigma_data"):  # a map
        return torch.ones(1)
    some = batch(0, CLASSES, ROWS)
    out: Tensor = network(some.x, torch.ones(ROWS), some.conditioning)
    return out


def weights(state: DistillState) -> dict[str, Tensor]:
    """All weights of each network as one vector, and the running means of the ratio."""
    found = {
        name: torch.cat([whole(p.detach()).flatten() for p in module.parameters()])
        for name, module in state.modules().items()
    }
    found["output of the average"] = averaged(state)
    if state.normalizer is not None:
        found |= {f"ratio {name}": total for name, total in state.normalizer.state_dict().items()}
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that processes share out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def train(rank: int, size: int, folder: str, cases: list[Case]) -> None:
    """One of several processes; the first writes ``found.json``.

    For each case: by network, how far its weights are from those of a process that has the whole batch; and
    by name, how far what the steps reported is, averaged over the ranks.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(backend(), init_method=f"file://{folder}/store", rank=rank, world_size=size)
    ranks, found = Ranks(rank, size), {}
    for case in cases:
        state, infos = trained(case, ranks)
        means = [{key: ranks.mean(value.double()) for key, value in info.items()} for info in infos]
        mine = weights(state)
        if rank == 0:
            alone, expected = trained(case)
            theirs = weights(alone)
            found[case.name] = {
                **{name: distance(value, theirs[name]) for name, value in mine.items()},
                **{
                    f"info {key}": max(
                        distance(own[key].nan_to_num(), info[key].double().nan_to_num())
                        for own, info in zip(means, expected, strict=True)
                        if key in info
                    )
                    for key in means[-1]
                },
            }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
