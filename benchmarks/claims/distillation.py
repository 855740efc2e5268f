"""What is claimed of other methods of distillation, and of what helps them."""

from __future__ import annotations

from claim import Claim

CLAIMS: tuple[Claim, ...] = ()
