"""What is claimed of solvers, guidance, composition, paths and noise."""

from __future__ import annotations

from claim import Claim

CLAIMS: tuple[Claim, ...] = ()
