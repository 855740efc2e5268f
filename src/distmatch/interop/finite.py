"""Weights that are NaN or infinite, found as they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from distmatch.base.errors import UserError

_SHOWN = 3  # tensors in a message


def check_finite(model: nn.Module, folder: Path) -> None:
    """Refuses weights that are not finite, which any later comparison would blame on something else.

    Args:
        model: A model, just loaded.
        folder: Its folder, the component of a pipeline.

    Raises:
        UserError: Some are; with their tensors and how many.
    """
    bad = {}
    for name, parameter in model.named_parameters():
        low, high = parameter.aminmax() if parameter.numel() else (torch.zeros(()), torch.zeros(()))
        if not (low.isfinite() and high.isfinite()):  # NaN is both ends; no copy of the tensor is made
            bad[name] = int((~parameter.isfinite()).sum())
    if bad:
        first = ", ".join(f"{count} in {name}" for name, count in list(bad.items())[:_SHOWN])
        rest = f" and {len(bad) - _SHOWN} more tensors" if len(bad) > _SHOWN else ""
        raise UserError(
            f"{folder} has weights that are not finite",
            got=f"{sum(bad.values())} NaN or infinite: {first}{rest}",
            expected="finite numbers",
            fix="copy the folder again; if the original has them too, it was damaged before, such as by a "
            "conversion to float16: save it again from float32 or bfloat16",
        )
