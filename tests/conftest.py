"""Settings for all tests."""

import os

import torch

# Tests run side by side; two threads each on two busy cores make small networks ten times slower. Processes
# that tests start must use one thread too: sums over other numbers of threads differ in the last bit.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
