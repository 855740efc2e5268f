"""Settings of the consistency family. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """What the methods of this family have of their own."""
