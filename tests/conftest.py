"""Settings for all tests."""

import torch

# Tests run side by side; two threads each on two busy cores make small networks ten times slower.
torch.set_num_threads(1)
