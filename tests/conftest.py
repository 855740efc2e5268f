"""Settings for all tests."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# One thread unless the environment names another number. Tests run side by side; two threads each on two busy
# cores make small networks ten times slower. Processes that tests start take the same number: sums over other
# numbers of threads differ in the last bit.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)

# The same examples on every machine and in every run: a failure can be repeated.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    """Other packages that tests compare with set the number of threads of the whole process."""
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `cli` by the folder or by what a test calls, and `unit` what has no other of our marks."""
    folder, calls = Path(__file__).parent / "cli", {"command", "done", "Forked"}
    for item in items:
        names = item.function.__code__.co_names if isinstance(item, pytest.Function) else ()
        if folder in item.path.parents or calls.intersection(names):
            item.add_marker("cli")
        if not any(item.get_closest_marker(name) for name in ("cli", "statistical", "gpu", "slow")):
            item.add_marker("unit")


def pytest_collection_finish() -> None:
    """Leaves modules and tests out of later garbage collections, which would each go through all of them."""
    _freeze()


@pytest.fixture(autouse=True, scope="module")
def _frozen_imports() -> Iterator[None]:
    """Leaves out what the tests of a file imported and cached: diffusers alone makes 270,000 objects."""
    yield
    _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()
