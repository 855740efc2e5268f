"""Networks of two noise levels: from x at one to x at another, in one call (CTM, MeanFlow, IMM).

Such a denoiser is called as ``D(x, sigma, labels, target_sigma=s)``. It is not the posterior mean but what
:func:`distmatch.diffusion.denoiser.jump` needs to arrive at s; at ``s = sigma`` it is the posterior mean, and
without ``target_sigma`` it goes all the way to the data, as a student does.
"""

from __future__ import annotations

import copy

from torch import nn

from distmatch.base.errors import UserError
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.layers import ConditionEmbedding


def as_jump(denoiser: nn.Module) -> EDMDenoiser:
    """A copy that also takes the level to jump to; until it is trained, that level changes nothing.

    Args:
        denoiser: A denoiser with a built-in network; one that jumps already is copied as it is.

    Raises:
        UserError: Its network comes from elsewhere and has no place for a second level.
    """
    return taught_to_jump(copy.deepcopy(require_jump(denoiser)))


def require_jump(denoiser: nn.Module) -> EDMDenoiser:
    """The denoiser, if :func:`as_jump` can teach it a second level.

    Raises:
        UserError: It cannot.
    """
    if not isinstance(denoiser, EDMDenoiser) or not _conditionings(denoiser):
        raise UserError(
            "this network has no input for a second noise level, which a jump needs",
            got="a network from elsewhere",
            expected="an mlp, unet or dit of distmatch",
            fix="choose a method with one noise level, such as consistency or scm; or a student with a "
            "network "
            'of distmatch, net="unet", which is first fitted to the predictions of yours',
        )
    return denoiser


def taught_to_jump(denoiser: EDMDenoiser) -> EDMDenoiser:
    """The denoiser itself, its network given a second level. Its weights start at zero."""
    if not denoiser.jumps:
        for conditioning in _conditionings(denoiser):
            conditioning.add_second_level()
        denoiser.jumps = True
    return denoiser


def _conditionings(denoiser: EDMDenoiser) -> list[ConditionEmbedding]:
    return [part for part in denoiser.net.modules() if isinstance(part, ConditionEmbedding)]
