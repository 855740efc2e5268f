"""Whether several processes train what one does: every method, whole and shared-out weights, full and lora.

    torchrun --nproc-per-node 2 -- benchmarks/ranks.py
    torchrun --nproc-per-node 4 -- benchmarks/ranks.py [METHOD ...]

Each run is repeated by the first process alone with the whole batch. Printed is the distance of the weights
of each network after 20 steps relative to their norm: the largest over the networks, and which it was. Freeze
phases are among the settings: warm-up of the fake score, its steps without the student, DisBack's recording.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distmatch.base.ranks import Ranks
from distmatch.methods.table import METHODS
from tests.helpers.ranks import CASES, Case, distance, trained, weights
from tests.helpers.small import read_by

STEPS, BOUND = 20, 1e-5


def main() -> int:
    """Prints the table; returns 1 where a distance is beyond the bound."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, worst = Ranks(dist.get_rank(), dist.get_world_size()), 0.0
    modes = ["ddp", "fsdp2", *(["hybrid"] if ranks.size >= 4 else [])]
    if ranks.main:
        print(f"{ranks.size} processes, {STEPS} steps, bound {BOUND:g}")
    for mode, train, accumulate in itertools.product(modes, ("full", "lora"), (1, 2)):
        for name in sys.argv[1:] or METHODS:
            own = read_by(name, train=train, accumulate=accumulate)
            if (train == "lora" and "train" not in own) or (accumulate > 1 and "accumulate" not in own):
                continue
            case = Case(name, name, {**CASES.get(name, {}), **own}, STEPS, mode, 2 if mode == "hybrid" else 0)
            mine = weights(trained(case, ranks)[0])
            if not ranks.main:
                continue
            alone = weights(trained(Case(name, name, case.settings, STEPS))[0])
            found = {key: distance(mine[key], alone[key]) for key in mine if not key.startswith("output")}
            most = max(found, key=lambda key: found[key])
            worst = max(worst, found[most])
            print(f"{mode:7} {train:5} x{accumulate} {name:16} {found[most]:.1e}  {most}", flush=True)
    if ranks.main:
        print(f"largest: {worst:.1e}")
    failed = ranks.largest(int(worst > BOUND))
    dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    sys.exit(main())
