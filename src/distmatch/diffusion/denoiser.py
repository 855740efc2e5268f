"""The one model contract: D(x, sigma, conditioning) in the variance-exploding frame x = x0 + sigma eps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from distmatch.base.checks import batch_of
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, example_conditioning

ReturnFeatures = bool | Literal["only"]
"""What a pass returns: the prediction, ``(prediction, features)``, or only the features."""

Features = list[Tensor]
"""Activations of a network, (B, C) or (B, C, H, W) each."""

Output = Tensor | tuple[Tensor, Features] | Features
"""What a pass returns for any ``return_features``."""


@runtime_checkable
class Denoiser(Protocol):
    """Posterior mean E[x0 | x] of clean data, given ``x = x0 + sigma eps`` and perhaps a condition.

    Attributes:
        shape: Shape of one sample, for example ``(1, 8, 8)`` or ``(2,)``.
        num_classes: Number of classes it can be conditioned on; 0 when it takes no labels.
        conditioning_spec: Optional: the fields that it takes, by name; labels of its classes when absent.
            Read it with :func:`~distmatch.diffusion.conditioning.spec_of`.
        null_conditioning: Optional, for one that takes more than labels: a method that gives what "no
            condition" is for n samples. Read it with
            :func:`~distmatch.diffusion.conditioning.null_conditioning`.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise level it is meant for.
        sigma_max: Largest noise level; sampling starts there.
        gaussian_kernel: Optional, True when absent: whether the noise is Gaussian, so that (D - x) / sigma^2
            is the score of a density. Read it with :func:`has_score`.
    """

    shape: tuple[int, ...]
    num_classes: int
    sigma_data: float
    sigma_min: float
    sigma_max: float

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """Denoises ``x`` (B, *shape) at levels ``sigma`` (B,).

        ``conditioning`` is a :class:`~distmatch.diffusion.conditioning.Conditioning`, class labels (B,)
        int64, or None for no condition; an implementation reads it with
        :func:`~distmatch.diffusion.conditioning.as_conditioning`.
        """
        ...


class FeatureDenoiser(Denoiser, Protocol):
    """A denoiser that also returns activations of its network, from the one pass of a call.

    Attributes:
        has_features: True.
    """

    has_features: bool

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: ConditioningLike = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Any:
        """The prediction; with ``return_features`` the pair of it and a list, or with ``"only"`` the list."""
        ...


def has_features(model: object) -> TypeGuard[FeatureDenoiser]:
    """Whether a denoiser or network takes ``return_features``: what its attribute ``has_features`` says."""
    return bool(getattr(model, "has_features", False))


def asked(return_features: ReturnFeatures) -> dict[str, ReturnFeatures]:
    """The keyword for an inner call: none for a plain one, which a network without features takes too."""
    return {"return_features": return_features} if return_features else {}


def on_prediction(output: Any, return_features: ReturnFeatures, change: Callable[[Tensor], Tensor]) -> Output:
    """What an inner call returned, with its prediction changed; features stay as they are."""
    if return_features == "only":
        features: Features = output
        return features
    if return_features:
        prediction, features = output
        return change(prediction), features
    return change(output)


def pooled(features: list[Tensor]) -> Tensor:
    """Features (B, C), tokens (B, N, C) or maps (B, C, ...) as one (B, sum of C), averaged over positions."""
    flat = [f.mean(1) if f.ndim == 3 else f.flatten(2).mean(2) if f.ndim > 3 else f for f in features]
    return torch.cat(flat, dim=1)


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshapes ``sigma`` (B,) so that it broadcasts over ``x`` (B, ...)."""
    return sigma.reshape(-1, *([1] * (x.ndim - 1)))


def check_inputs(x: Tensor, sigma: Tensor | float, shape: Sequence[int]) -> None:
    """Refuses samples of another shape than the model's, and noise levels that are not theirs.

    Only shapes are read, so that nothing waits for the device; and none while a graph is made, which would
    be of that batch size alone.

    Args:
        x: (B, *shape).
        sigma: One noise level for all samples, or one for each, (B,).
        shape: Shape of one sample.

    Raises:
        UserError: They are others.
    """
    if torch.compiler.is_compiling():
        return
    if tuple(x.shape[1:]) != tuple(shape):
        raise UserError(
            "these samples do not have the shape of the model",
            got=f"a batch of shape {tuple(x.shape)}",
            expected=batch_of(shape, "batch"),
            fix="add the channel axis of grey images, or load the model that belongs to this data",
        )
    count = sigma.numel() if isinstance(sigma, Tensor) else 1
    if count not in (1, len(x)):
        raise UserError(
            "there must be one noise level for all samples, or one for each",
            got=f"{count} for {len(x)} samples",
            expected=f"sigma of shape ({len(x)},)",
            fix="pass for example torch.full((len(x),), 1.0)",
        )


def levels_like(y: Tensor, level: float, dtype: torch.dtype) -> Tensor:
    """One noise level for each row of ``y``, (B,), in ``dtype``, or in float32 for a shorter one."""
    precise = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return torch.full((len(y),), level, dtype=precise, device=y.device)


def jump(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    target_sigma: Tensor,
    conditioning: ConditioningLike = None,
) -> Tensor:
    """Takes ``x`` from level t = ``sigma`` to s = ``target_sigma``: ``s/t x + (1 - s/t) D(x, t, s)``.

    A jump to its own level changes nothing, whatever the network returns (CTM, Kim et al. 2024, eq. 5).

    Args:
        denoiser: A denoiser of two levels, called with ``target_sigma``.
        x: Noised samples (B, *shape).
        sigma: Their levels (B,), positive.
        target_sigma: The levels to go to (B,), in [0, sigma].
        conditioning: Their labels (B,), or None.
    """
    kept = expand(target_sigma / sigma, x)
    return kept * x + (1 - kept) * denoiser(x, sigma, conditioning, target_sigma=target_sigma)


def score(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
    """The score (D(x) - x) / sigma^2 of the noised distribution."""
    return (denoiser(x, sigma, conditioning) - x) / expand(sigma, x) ** 2


def has_score(denoiser: Denoiser) -> bool:
    """Whether (D(x) - x) / sigma^2 is a score: False for a teacher whose noise is not Gaussian (PFGM++).

    A wrapper without this attribute has the value of its attribute ``inner``.
    """
    inner: object | None = denoiser
    while inner is not None:
        flag = getattr(inner, "gaussian_kernel", None)
        if flag is not None:
            return bool(flag)
        inner = getattr(inner, "inner", None)
    return True


def require_score(denoiser: Denoiser, purpose: str) -> None:
    """Refuses a teacher without a score for a ``purpose`` that needs one.

    Raises:
        UserError: :func:`has_score` is False.
    """
    if not has_score(denoiser):
        raise UserError(
            f"{purpose} needs the score of the noised data, which this teacher does not have",
            got="a teacher whose noise is not Gaussian (gaussian_kernel is False)",
            expected="(D(x) - x) / sigma^2 to be the gradient of a log density",
            fix="use a teacher trained with Gaussian noise; deterministic solvers can sample this one",
        )


def require_input_gradient(denoiser: Denoiser, purpose: str, device: torch.device) -> None:
    """Refuses a denoiser that cannot be differentiated by its input, after one call on one sample.

    Raises:
        UserError: Its output does not depend on its input.
    """
    with torch.enable_grad():
        x = torch.zeros(1, *denoiser.shape, device=device, requires_grad=True)
        out = denoiser(x, torch.ones(1, device=device), example_conditioning(denoiser, 1, device))
    if not out.requires_grad:
        raise UserError(
            f"{purpose} differentiates the teacher with respect to its input, which this teacher does "
            f"not support",
            got=f"a {type(denoiser).__name__} whose output has no gradient",
            fix="compute with gradients (without torch.no_grad, inference_mode or numpy), or use a "
            "method that needs none, such as dmd2 or f-distill",
        )


def is_diffused(denoiser: Denoiser) -> bool:
    """Whether the scores at all levels are those of one distribution, noised: False for a guided teacher.

    Its scores tilt each noised distribution separately, which differs from noising the tilted distribution;
    so it is with a posterior that is approximated at each level. Wrappers without an attribute ``diffused``
    have the value of the wrapped denoiser.
    """
    inner: object | None = denoiser
    while inner is not None:
        flag = getattr(inner, "diffused", None)
        if flag is not None:
            return bool(flag)
        inner = getattr(inner, "inner", None)
    return True


def require_diffused(denoiser: Denoiser, purpose: str) -> None:
    """Refuses a guided teacher and its like for a ``purpose`` that follows one density through the levels.

    Raises:
        UserError: :func:`is_diffused` is False.
    """
    if not is_diffused(denoiser):
        raise UserError(
            f"{purpose} needs scores that belong to one density at all noise levels",
            got="a guided teacher or an approximate posterior, whose scores at each noise level are "
            "independent",
            fix="use the unmodified teacher; log_likelihood(prior='sampler') gives the density of "
            "guided samples",
        )


def is_denoiser(model: object) -> bool:
    """Whether an object can be called and has the attributes of a denoiser."""
    return callable(model) and all(hasattr(model, name) for name in _CONTRACT)


def require_denoiser(model: object) -> None:
    """Accepts only denoisers; the error explains how to wrap a network of another kind.

    Raises:
        UserError: It is no denoiser: a network as EDM's code or k-diffusion has them, or any other object.
    """
    if is_denoiser(model):
        return
    said = [name for name in _CONTRACT if not hasattr(model, name)]
    name = type(model).__name__
    if hasattr(model, "img_resolution") and hasattr(model, "label_dim"):
        kind, fix = "a network of EDM's code, which takes (x, sigma, class_labels)", _EDM
    elif hasattr(model, "inner_model"):
        kind, fix = "a network of k-diffusion's code, which takes (x, sigma)", _CLEAN
    elif callable(model):
        kind, fix = "a network or function with an unknown prediction type", _ANY
    else:
        kind, fix = "an object that cannot be called", _ANY
    raise UserError(
        f"a {name} is not a denoiser: {kind}",
        got=f"no {', '.join(said)}" if said else name,
        expected=f"D(x, sigma, conditioning) with the attributes {', '.join(_CONTRACT)}",
        fix=fix,
    )


_CONTRACT = ("shape", "num_classes", "sigma_data", "sigma_min", "sigma_max")
_CLEAN = "it returns the clean sample: teacher = dm.as_denoiser(model, shape=(channels, height, width))"
_EDM = "it returns the clean sample and has all attributes: teacher = dm.as_denoiser(model)"
_ANY = (
    'teacher = dm.as_denoiser(model, path, prediction, shape=...), for example path "vp" and prediction '
    '"eps" for DDPM, "edm" and "x0" for a model that returns the clean sample, "condot" and "flow" for '
    "flow matching"
)
