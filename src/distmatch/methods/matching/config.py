"""Settings of the methods with a fake score. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """What single methods of this family have of their own."""
