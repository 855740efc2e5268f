"""Settings of the transport family. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """What the methods of this family have of their own."""
