"""Guidance by a second prediction: classifier-free guidance and autoguidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.base.memory import out_of_memory
from distmatch.diffusion.conditioning import (
    Conditioning,
    ConditioningLike,
    as_conditioning,
    cat,
    check_conditioning,
    for_model,
    has_condition,
    null_conditioning,
    spec_of,
)
from distmatch.diffusion.denoiser import Denoiser, expand, has_score
from distmatch.diffusion.guidance.base import Features, Guidance, Pass, Where, checked_scale
from distmatch.diffusion.latents import require_same_samples
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.pfgm import pfgm_dims
from distmatch.diffusion.predictions import PREDICTIONS, convert
from distmatch.diffusion.wrapper import Calls, cost_of


class Guided(Guidance):
    """D_ref + scale (D_main - D_ref). Scale 1 is no guidance and makes no second call.

    Classifier-free guidance (Ho and Salimans 2022, whose w is ``scale - 1``) takes the same model without
    the class as reference, in one batch of twice the size. Autoguidance (Karras et al. 2024, "Guiding a
    diffusion model with a bad version of itself") takes a weaker model with the same class.

    Everything a network may predict is affine in D with the same coefficients for both, so that guiding
    eps, v, flow or score by this formula is the same thing.

    Args:
        inner: The main model. Without a reference it must be class-conditional with an unconditional
            prediction.
        scale: Guidance scale w, any finite number; below 0 it leads away from the class.
        reference: Another model in place of the main one without its class. One with the same classes
            receives the same ones; one without classes is a separate unconditional model.
        interval: (low, high): guide where low < sigma <= high only (Kynkaanniemi et al. 2024).
        negative: What to lead away from in place of no condition, such as a negative prompt: a label (1,) or
            a conditioning of one row, the same for all samples.
        rescale: phi in [0, 1] of Lin et al. (2023, arXiv 2305.08891, section 3.4), against over-exposure at
            large scales: the guided prediction of the network is multiplied by 1 - phi + phi std(main) /
            std(guided), with the standard deviations over each sample. As it is not linear, it depends on
            what the network predicts: eps, v or flow, or x0 where that is not known.

    Raises:
        UserError: No classes and no reference, models that do not fit together, a bad scale or interval.
    """

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        *,
        reference: Denoiser | None = None,
        interval: tuple[float, float] | None = None,
        negative: ConditioningLike = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(inner, interval)
        self.scale = checked_scale(scale)
        check_number("the rescaling of a guidance", rescale, "[0, 1]")
        self.rescale = rescale
        self.reference = reference
        self.negative = as_conditioning(negative)
        check_conditioning(self.negative, 1, spec_of(inner if reference is None else reference))
        if reference is not None:
            check_pair(inner, reference)
        elif not spec_of(inner):
            raise UserError(
                "guidance needs a conditional teacher",
                got="an unconditional one",
                fix="train the teacher on labeled data, or leave --guidance at 1; a weaker model as "
                "reference can guide an unconditional one",
            )

    @property
    def neutral(self) -> bool:
        """At scale 1."""
        return self.scale == 1

    def _guidable(self, conditioning: Conditioning) -> Where:
        if self.negative:
            return True
        if self.reference is None:
            return bool(conditioning)
        if spec_of(self.reference).keys() == spec_of(self).keys():
            return True
        # Without a condition, two unconditional models differ by their faults only.
        return has_condition(conditioning)

    def _guided(
        self, forward: Pass, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, Features]:
        if self.reference is not None:
            return super()._guided(forward, x, sigma, conditioning)
        away = self._away_from(len(x), x.device)
        conditioning = conditioning or null_conditioning(self.inner, len(x), x.device)
        both, features = forward(torch.cat([x, x]), torch.cat([sigma, sigma]), cat([conditioning, away]))
        main, reference = both.chunk(2)
        return main, self._mix(main, reference, x, sigma), [f[: len(x)] for f in features]

    def _away_from(self, n: int, device: torch.device) -> Conditioning:
        """What predictions are led away from: the negative conditioning, or none at all."""
        if not self.negative:
            return null_conditioning(self.inner, n, device)
        return self.negative.to(device).expand(n)

    def _corrected(self, main: Tensor, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if self.reference is None:
            return main
        cond = self._away_from(len(x), x.device) if self.negative else conditioning
        return self._mix(main, self.reference(x, sigma, for_model(self.reference, cond)), x, sigma)

    def _mix(self, main: Tensor, reference: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        guided = reference + self.scale * (main - reference)
        if self.rescale == 0:
            return guided
        own: Any = self.inner
        while not hasattr(own, "prediction") and hasattr(own, "inner"):
            own = own.inner
        if (kind := getattr(own, "prediction", "x0")) not in PREDICTIONS:
            kind = "x0"
        path = noise_path(getattr(own, "path", None) or "edm")
        c = path.coefficients(path.t_of_rho(sigma))
        noised = expand(c.alpha, x).to(x.dtype) * x
        plain, strong = (convert(d, "x0", kind, noised, c) for d in (main, guided))
        spread = [value.flatten(1).std(1) for value in (plain, strong)]
        factor = 1 - self.rescale + self.rescale * spread[0] / spread[1].clamp_min(torch.finfo(x.dtype).tiny)
        return convert(expand(factor, x) * strong, kind, "x0", noised, c)

    def _cost(self, inner: Calls, sigma: Tensor, conditioning: Conditioning) -> Calls:
        if self.reference is None:
            return inner + inner.as_reference
        return inner + cost_of(self.reference, sigma, for_model(self.reference, conditioning)).as_reference


def guided(
    denoiser: Denoiser,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    reference: Denoiser | None = None,
    negative: ConditioningLike = None,
    rescale: float = 0.0,
) -> Denoiser:
    """The denoiser with the requested guidance, or unchanged at scale 1.

    Args:
        denoiser: The teacher.
        scale: Guidance scale; 1 is none.
        interval: (low, high): guide where low < sigma <= high only.
        reference: A weaker model for autoguidance; None is classifier-free guidance.
        negative: What to lead away from; None is no condition.
        rescale: As for :class:`Guided`.

    Raises:
        UserError: As :class:`Guided`; or an interval, a reference, a negative condition or a rescaling at
            scale 1, where they do nothing.
    """
    if checked_scale(scale) != 1:
        return Guided(
            denoiser, scale, reference=reference, interval=interval, negative=negative, rescale=rescale
        )
    if interval is not None or reference is not None or negative is not None or rescale:
        raise UserError(
            "an interval, a reference, a negative conditioning or a rescaling has no effect at guidance "
            "scale 1",
            fix="give a scale too, for example --guidance 2",
        )
    return denoiser


def require_null_class(denoiser: Denoiser) -> None:
    """Refuses a class-conditional model without an unconditional prediction, which guidance needs.

    It is asked once, for one sample, so that what would fail in the middle of a run fails before it.

    Raises:
        UserError: It refuses the label -1, or was trained without ever hiding a label.
    """
    if not spec_of(denoiser):
        return
    reason = "a teacher that was trained with --label-dropout 0"
    if getattr(denoiser, "saw_no_class", True):
        own = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
        like = torch.zeros(1, device=own.device if own is not None else None)
        try:
            with torch.no_grad():
                denoiser(
                    like.new_zeros(1, *denoiser.shape), like + 1, null_conditioning(denoiser, 1, like.device)
                )
            return
        except (UserError, IndexError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            reason = str(error).split("\n")[0][:200]
    raise UserError(
        "guidance needs a teacher with an unconditional prediction",
        got=reason,
        fix="leave --guidance at 1; or train the teacher with --label-dropout 0.1, or set its null class",
    )


def check_pair(main: Denoiser, reference: Denoiser) -> None:
    """Refuses a reference whose predictions cannot be compared with those of the main model.

    Raises:
        UserError: Other samples, other classes or another kind of noise.
    """
    require_same_samples([main, reference], "a guidance by a reference")
    if reference.num_classes not in (0, main.num_classes):
        raise UserError(
            "the reference of a guidance has other classes than the main model",
            got=f"{reference.num_classes} classes",
            expected=f"{main.num_classes}, or none",
            fix="use a reference trained with the same labels, or by an unconditional one",
        )
    if has_score(main) != has_score(reference):
        raise UserError(
            "main model and reference were trained with different kinds of noise",
            got="one Gaussian, one not (gaussian_kernel)",
            fix="use two models with the same kind of noise",
        )
    if pfgm_dims(main) != pfgm_dims(reference):
        raise UserError(
            "main model and reference were trained with different noises of PFGM++",
            got=f"{pfgm_dims(main):g} and {pfgm_dims(reference):g} extra dimensions",
            fix="use two models with the same number",
        )
