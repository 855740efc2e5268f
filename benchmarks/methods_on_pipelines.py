"""Methods crossed with steps, pipelines and kinds of training: a few updates of each on tiny pipelines.

    python benchmarks/methods_on_pipelines.py            # f-distill, dmd2, sid, sida, consistency, rcm
    python benchmarks/methods_on_pipelines.py disback    # others

Each run is checked as in ``tests/interop/test_pipeline_methods.py``, which has one pipeline for each method
and number of steps. The table has the runs of each method and pipeline that passed, and their seconds.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distmatch.interop.pipelines import load_pipeline
from tests.helpers.pipeline_training import NAMED, PIPELINES, STEPS, trained
from tests.helpers.pipelines import SIZE, save


def main(methods: tuple[str, ...]) -> int:
    """Prints the table; returns the number of failures."""
    failed: list[str] = []
    print("| method | " + " | ".join(PIPELINES) + " |")
    print("|---" * (len(PIPELINES) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder:
        teachers = {
            name: load_pipeline(save(name, Path(folder)), check=False, **SIZE[name]) for name in PIPELINES
        }
        for method in methods:
            cells = []
            for name in PIPELINES:
                start, good = time.perf_counter(), 0
                for steps, train in itertools.product(STEPS, ("full", "lora")):
                    try:
                        trained(teachers[name], method, train, steps)
                        good += 1
                    except Exception as error:
                        failed.append(f"{method}, {name}, {train}, {steps} steps: {error!r}")
                cells.append(f"{good} of {2 * len(STEPS)}, {time.perf_counter() - start:.1f} s")
            print(f"| `{method}` | " + " | ".join(cells) + " |", flush=True)
    print("\n".join(failed))
    return len(failed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(bool(main(tuple(sys.argv[1:]) or NAMED)))
