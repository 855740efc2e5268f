"""Results that are the same but for the rounding of kernels."""

import torch
from torch import Tensor

# Some hundred roundings of each type, which networks of these sizes add up over a few calls.
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def assert_same_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """The same computation with weights or inputs in other memory: copies, loaded files, parts of a batch.

    Kernels choose their way by the size and the alignment of memory, and by the processor, so the last bits
    of equal networks may differ. Equality of bits is asserted only of what is copied, and of a computation
    that is repeated in one process on the same memory, or resumed.
    """
    tolerance = _TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
