"""Settings for all tests."""

import os

import hypothesis
import pytest
import torch

# Tests run side by side; two threads each on two busy cores make small networks ten times slower. Processes
# that tests start must use one thread too: sums over other numbers of threads differ in the last bit.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples on every machine and in every run: a failure can be repeated.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Other packages that tests compare with set the number of threads of the whole process."""
    torch.set_num_threads(1)
