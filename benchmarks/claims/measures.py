"""What is claimed of losses, likelihoods and measures, most of it as an identity."""

from __future__ import annotations

from claim import Claim

CLAIMS: tuple[Claim, ...] = ()
