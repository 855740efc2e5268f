"""Distillation: the student, and the methods as `init`, `step` and `result` on an explicit state.

:func:`build` is for a loop of your own; it is loaded on first use, since the tables here need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmatch.methods.construct import build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from distmatch.methods.construct import build

        return build
    raise AttributeError(f"module 'distmatch.methods' has no attribute {name!r}")
