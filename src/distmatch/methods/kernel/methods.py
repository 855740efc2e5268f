"""The methods that compare samples with samples. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distmatch.methods.kernel.settings import IMMSettings, MMDSettings
from distmatch.methods.method import Method

if TYPE_CHECKING:
    from distmatch.methods.context import Context, Distiller


def _mmd(context: Context[MMDSettings]) -> Distiller:
    from distmatch.methods.consistency.direct import Direct
    from distmatch.methods.kernel.mmd import ChainMMD

    return Direct(context, ChainMMD(context))


def _imm(context: Context[IMMSettings]) -> Distiller:
    from distmatch.methods.consistency.direct import Direct
    from distmatch.methods.kernel.imm import InductiveMatching

    return Direct(context, InductiveMatching(context))


METHODS = (
    Method(
        name="mmd",
        family="kernel",
        summary="all steps are fine-tuned end to end by a kernel distance to real samples",
        citation="Aiello et al. 2023, arXiv 2301.07969",
        limits="improves metrics on its own features too much; noisy with small batches",
        settings=MMDSettings,
        build=_mmd,
        labels_only="it compares samples of one condition with each other",
        teacher_gradient=True,
    ),
    Method(
        name="imm",
        family="kernel",
        summary="jumps from a noise level agree in distribution with jumps from just below it, by a "
        "kernel on particles",
        citation="Zhou et al. 2025, arXiv 2503.07565",
        limits="needs a built-in network; learns from the data alone, so it needs many steps",
        settings=IMMSettings,
        build=_imm,
        labels_only="it compares samples of one condition with each other",
    ),
)
