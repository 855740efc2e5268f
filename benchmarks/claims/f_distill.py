"""What is claimed of divergences: f-distill's orderings, and methods of other divergences."""

from __future__ import annotations

from claim import Claim

CLAIMS: tuple[Claim, ...] = ()
