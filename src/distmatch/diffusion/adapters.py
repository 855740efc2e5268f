"""Any network as a denoiser, whatever it predicts on whatever path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import (
    LABEL,
    Conditioning,
    ConditioningLike,
    ConditioningSpec,
    as_conditioning,
    check_conditioning,
    label_spec,
    labels_of,
    null_labels,
)
from distmatch.diffusion.denoiser import (
    Output,
    ReturnFeatures,
    asked,
    check_inputs,
    expand,
    has_features,
    on_prediction,
)
from distmatch.diffusion.paths import DiscretePath, noise_path
from distmatch.diffusion.paths.core import NoisePath, check_prior
from distmatch.diffusion.paths.steps import check_shift
from distmatch.diffusion.predictions import Coefficients, check_prediction, convert
from distmatch.diffusion.solvers.sampling import SamplingMixin

_PURE_NOISE = 1e5  # a path that goes beyond this ratio ends in pure noise: samplers start below it, at _START
_START = 1000.0
_FINEST = 0.002  # where samplers stop on a path that begins without noise
_TINY = 1e-12  # rates of change may be infinite without noise


class PredictionDenoiser(SamplingMixin, nn.Module):
    """The denoiser around ``net(x_t, t)``, ``net(x_t, t, labels)`` or ``net(x_t, t, name=condition, ...)``.

    A sample y at level sigma in the frame of the denoisers is ``x_t = alpha(t) y`` on the path, at the time
    with ``sigma(t) / alpha(t) = sigma``. What the network predicts there is turned into x0. Beyond the ends
    of its path, the network receives the end time.

    Args:
        net: The network. It may have ``has_features = True``, and then takes ``return_features`` as those of
            distmatch do. It is given ``x_t`` in the dtype of its parameters, ``t`` as a vector (B,) in the
            same dtype but at least float32 (int64 when ``levels`` is "snap"), labels if it has classes, and
            the fields of ``conditioning`` by their names, floating ones in that dtype too.
        path: A path or its name.
        prediction: What it predicts: "x0", "eps", "v", "flow" or "score".
        shape: Shape of one sample.
        num_classes: Number of classes; 0 when the network takes no labels.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise level; by default that of the path.
        sigma_max: Largest noise level; by default that of the path, or 1000 when it ends in pure noise.
        time: How the network counts time: a factor, such as 999, or a function ``t -> its argument``.
        levels: "interpolate" passes fractional timesteps to a discrete-time network, "snap" rounds them to
            its training grid.
        null_class: The label that means "unconditional" in this network. None: it supports -1 and
            ``labels=None``, as the built-in networks do.
        conditioning: Fields of the conditioning that the network takes by name, such as
            ``{"encoder_hidden_states": FieldSpec((77, 768))}``; with a field ``label`` in place of
            ``num_classes``.
        null: The null conditioning (one row), such as the embedding of the empty prompt.
            Needed for guidance and for calls without a condition.
        reverse_time: The network's time runs from noise at 0 to data at 1, so it receives ``1 - t`` and its
            flow has the opposite sign. Much flow-matching code counts so.
        shift: For a model whose sampler takes steps that are even in the time of the path, as most pipelines
            do: the shift s of a flow, t = s u / (1 + (s - 1) u), or 1. By default samplers, students and the
            noise levels of distillation then follow these times; None spaces all of them as EDM does.

    Raises:
        UserError: An unknown name, levels outside the path, a path that does not reach its prior, snapping
            without levels to snap to.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        path: str | NoisePath,
        prediction: str,
        *,
        shape: Sequence[int],
        num_classes: int = 0,
        sigma_data: float = 0.5,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        time: float | Callable[[Tensor], Tensor] | None = None,
        levels: Literal["interpolate", "snap"] = "interpolate",
        null_class: int | None = None,
        conditioning: ConditioningSpec | None = None,
        null: Conditioning | None = None,
        reverse_time: bool = False,
        shift: float | None = None,
    ) -> None:
        super().__init__()
        check_prediction(prediction)
        self.net = net
        self.path = noise_path(path)
        self.prediction = prediction
        self.shape = tuple(shape)
        if conditioning is not None and num_classes:
            raise UserError(
                "the conditioning of a network is declared twice",
                got="num_classes and conditioning",
                fix='omit num_classes, and declare "label": FieldSpec((), torch.int64, classes=10) there',
            )
        self.by_name = conditioning is not None
        self.conditioning_spec = label_spec(num_classes) if conditioning is None else dict(conditioning)
        self.num_classes = self.conditioning_spec[LABEL].classes if LABEL in self.conditioning_spec else 0
        if null is not None:
            check_conditioning(null, 1, self.conditioning_spec)
        self.null = null
        self.sigma_data = float(sigma_data)
        self.sigma_min, self.sigma_max = _range(self.path, sigma_min, sigma_max)
        check_prior(self.path, self.sigma_data, rho_max=self.sigma_max)
        check_name("way to treat levels", levels, ("interpolate", "snap"))
        if levels == "snap" and not isinstance(self.path, DiscretePath):
            raise UserError(
                "snapping needs a path with discrete noise levels",
                got=f"the {self.path.name} path, which is continuous",
                fix="use discrete_path(alphas_cumprod), or levels='interpolate'",
            )
        if reverse_time and not 0 <= self.path.t_min < self.path.t_max <= 1:
            raise UserError(
                "reverse_time means 1 - t, so it needs a path whose times lie between 0 and 1",
                got=f"the {self.path.name} path, from {self.path.t_min:g} to {self.path.t_max:g}",
                fix="omit it, and convert the time with time=lambda t: ...",
            )
        if shift is not None:
            check_shift(self.path, shift)
        self.time, self.levels, self.null_class, self.reverse_time = time, levels, null_class, reverse_time
        self.shift = shift
        self.arguments: dict[str, Any] | None = None

    @property
    def has_features(self) -> bool:
        """Whether the network says that it takes ``return_features``."""
        return has_features(self.net)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: ConditioningLike = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Output:
        """Denoises ``x`` (B, *shape) at levels ``sigma`` (B,); ``conditioning`` (B,) int64, -1 for none.

        Args:
            x: Noised samples.
            sigma: Their levels.
            conditioning: Their labels.
            return_features: Also return the features of the network, in its own dtype, or ``"only"`` them.

        Returns:
            (B, *shape) in float32, or float64 for a float64 ``x``, whatever the dtype inside the network;
            with features the pair of it and a list.
        """
        noised, coefficients, arguments, named = self._inputs(x, sigma, conditioning)
        output = self.net(*arguments, **named, **asked(return_features))
        return on_prediction(output, return_features, lambda out: self._clean(out, noised, coefficients))

    def null_conditioning(self, n: int) -> Conditioning:
        """What "no condition" is for the network, for ``n`` samples.

        Raises:
            UserError: It takes more than labels, and no ``null`` was given.
        """
        if self.null is not None:
            return self.null.expand(n)
        if set(self.conditioning_spec) - {LABEL}:
            raise UserError(
                "this network was declared without an unconditional prediction",
                got=f"conditions {', '.join(self.conditioning_spec)} and no null",
                fix="give every sample a conditioning, or pass null=Conditioning({...}) of one row",
            )
        return null_labels(self.conditioning_spec, n)

    def _inputs(
        self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike
    ) -> tuple[Tensor, Coefficients, list[Any], dict[str, Tensor]]:
        check_inputs(x, sigma, self.shape)
        x = x if x.dtype == torch.float64 else x.float()
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1).expand(len(x))
        t = self.path.t_of_rho(level.clamp_min(_TINY))
        c = self.path.coefficients(t)
        # Beyond the ends of a path without closed form, time stops and the level is still what it is.
        c = replace(c, sigma=c.alpha * level)
        noised = expand(c.alpha, x).to(x.dtype) * x
        dtype = self._dtype(x)
        arguments: list[Any] = [noised.to(dtype), self._times(t, level, dtype)]
        if self.by_name:
            conditioning = as_conditioning(conditioning) or self.null_conditioning(len(x)).to(x.device)
            check_conditioning(conditioning, len(x), self.conditioning_spec)
            named = {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditioning.items()}
            if conditioning.label is not None and self.null_class is not None:
                named[LABEL] = torch.where(conditioning.label < 0, self.null_class, conditioning.label)
            return noised, c, arguments, named
        if self.num_classes > 0:
            arguments.append(self._labels(labels_of(conditioning), x))
        return noised, c, arguments, {}

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the network, or of ``x`` when it has no parameters."""
        if isinstance(self.net, nn.Module):
            for parameter in self.net.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
        return x.dtype

    def _times(self, t: Tensor, level: Tensor, dtype: torch.dtype) -> Tensor:
        if self.levels == "snap" and isinstance(self.path, DiscretePath):
            time_in = self.path.nearest(level)[0]
        else:
            time_in = t.clamp(self.path.t_min, self.path.t_max)
            time_in = 1 - time_in if self.reverse_time else time_in
            time_in = time_in.to(torch.promote_types(dtype, torch.float32))
        if self.time is None:
            return time_in
        return self.time(time_in) if callable(self.time) else self.time * time_in

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if self.null_class is None:
            return labels
        check_null(labels, self.null_class, self.num_classes)
        if labels is None:
            return torch.full((len(x),), self.null_class, dtype=torch.int64, device=x.device)
        return torch.where(labels < 0, self.null_class, labels)

    def _clean(self, value: Tensor, noised: Tensor, coefficients: Coefficients) -> Tensor:
        if value.shape != noised.shape:
            raise UserError(
                "the network does not return a tensor of the shape of its input",
                got=f"{tuple(value.shape)} for {tuple(noised.shape)}",
                fix="if it also returns a variance, wrap it so that it returns the prediction alone",
            )
        value = value.to(noised.dtype)
        if self.reverse_time and self.prediction == "flow":
            value = -value
        return convert(value, self.prediction, "x0", noised, coefficients)


def _range(path: NoisePath, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The levels of a denoiser on ``path``."""
    low, high = path.rho_min, path.rho_max
    if sigma_min is None:
        sigma_min = low if low > 0 else _FINEST
    if sigma_max is None:
        sigma_max = high if high < _PURE_NOISE else _START
    slack = 1 + 1e-6  # the user may have rounded
    if not (
        0 < sigma_min < sigma_max < float("inf") and low <= sigma_min * slack and sigma_max <= high * slack
    ):
        raise UserError(
            f"noise levels outside the {path.name} path",
            got=f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}",
            expected=f"0 < sigma_min < sigma_max, within {low:.6g} and {high:.6g}",
            fix="omit them, or give the path another range",
        )
    return sigma_min, sigma_max


def check_null(labels: Tensor | None, null_class: int, num_classes: int) -> None:
    """Refuses the null class as a label.

    On an accelerator the check would synchronize with the device, and is omitted.

    Raises:
        UserError: One of the labels is that class.
    """
    if labels is None or null_class >= num_classes or labels.device.type != "cpu":
        return
    if torch.compiler.is_compiling():  # a graph cannot branch on them
        return
    if bool((labels == null_class).any()):
        raise UserError(
            f"class {null_class} of this teacher means unconditional, and cannot be requested",
            got=f"labels with {null_class}",
            fix="use -1 for samples without a condition",
        )
