"""Measures claims of papers; ``page.py`` writes docs/claims.md from what is measured.

python benchmarks/claims/run.py             # all that have no result yet, hours of one core
python benchmarks/claims/run.py deis radd   # these, again
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import composing
import distillation
import f_distill
import measures
import sampling
import torch
import tyro
from claim import RESULTS, interval, save, verdict

CLAIMS = (*f_distill.CLAIMS, *distillation.CLAIMS, *sampling.CLAIMS, *composing.CLAIMS, *measures.CLAIMS)
"""All of them, in the order of the page."""


@dataclass(frozen=True)
class Run:
    """Claims by name; without names those that have no result yet."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()


def run(o: Run) -> None:
    torch.set_num_threads(1)
    known = [claim.name for claim in CLAIMS]
    if unknown := set(o.names) - set(known):
        raise SystemExit(f"no claim named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for claim in CLAIMS:
        if claim.name not in o.names if o.names else (RESULTS / f"{claim.name}.json").exists():
            continue
        began = time.process_time()
        measured = claim.measure()
        save(claim, measured, time.process_time() - began)
        mean, half = interval(measured.differences)
        print(f"{claim.name}: {mean:.4g} ± {half:.2g} {measured.unit}, {verdict(measured)}", flush=True)


if __name__ == "__main__":
    run(tyro.cli(Run))
