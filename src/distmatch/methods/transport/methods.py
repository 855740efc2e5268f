"""The map from noise to stored points. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distmatch.methods.method import Method
from distmatch.methods.transport.settings import DPMOTSettings

if TYPE_CHECKING:
    from distmatch.methods.context import Context, Distiller


def _dpm_ot(context: Context[DPMOTSettings]) -> Distiller:
    from distmatch.methods.transport.dpm_ot import Transport

    return Transport(context)


METHODS = (
    Method(
        name="dpm-ot",
        family="transport",
        summary="an optimal transport map from noise to stored latents of the teacher, then its last steps",
        citation="Li et al. 2023, arXiv 2307.11308",
        limits="a finite bank: no more different layouts than stored latents; several steps",
        settings=DPMOTSettings,
        build=_dpm_ot,
        labels_only="it stores latents of the teacher for each class",
        data="no",
    ),
)
