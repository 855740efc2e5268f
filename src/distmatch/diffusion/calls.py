"""How networks of other code bases are called: in which order, by which names, and what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.base.errors import UserError, unknown_name
from distmatch.diffusion.conditioning import LABEL
from distmatch.diffusion.denoiser import Output, ReturnFeatures
from distmatch.diffusion.hooked import Listener, features_of_pass, named_part

Conditions = Mapping[str, Tensor]
"""What samples are conditioned on, by name; class labels (B,) are ``label``, -1 for none."""

Call = Callable[[Any, Tensor, Tensor, Conditions], Any]
"""``call(module, x, t, conditions)``: a call of the module, and its prediction (B, *shape)."""

PLAIN, TIME_FIRST, KEYWORDS, EDM, DIFFUSERS = "plain", "time-first", "keywords", "edm", "diffusers"


def _plain(module: Any, x: Tensor, t: Tensor, conditions: Conditions) -> Any:
    others = {name: value for name, value in conditions.items() if name != LABEL}
    return module(x, t, *([conditions[LABEL]] if LABEL in conditions else []), **others)


def _time_first(module: Any, x: Tensor, t: Tensor, conditions: Conditions) -> Any:
    others = {name: value for name, value in conditions.items() if name != LABEL}
    return module(t, x, *([conditions[LABEL]] if LABEL in conditions else []), **others)


def _keywords(module: Any, x: Tensor, t: Tensor, conditions: Conditions) -> Any:
    return module(x, t, **{"class_cond" if name == LABEL else name: v for name, v in conditions.items()})


def _edm(module: Any, x: Tensor, sigma: Tensor, conditions: Conditions) -> Any:
    if LABEL not in conditions:
        return module(x, sigma)
    label = conditions[LABEL]
    rows = F.one_hot(label.clamp_min(0), int(module.label_dim)).to(torch.float32)
    return module(x, sigma, torch.where(label[:, None] < 0, 0.0, rows))


def _diffusers(module: Any, x: Tensor, t: Tensor, conditions: Conditions) -> Any:
    label = conditions.get(LABEL)
    # On an accelerator the check would wait for the device; there the embedding itself refuses -1. A graph
    # cannot branch on it at all.
    seen = None if label is None or label.device.type != "cpu" or torch.compiler.is_compiling() else label
    if seen is not None and bool((seen < 0).any()):
        raise UserError(
            "this network has no null class",
            got="samples without a condition",
            fix="give every sample a label and leave guidance at 1, or set null_class",
        )
    named = {"class_labels" if name == LABEL else name: value for name, value in conditions.items()}
    return module(x, timestep=t, return_dict=False, **named)[0]


CALLS: Mapping[str, Call] = {
    PLAIN: _plain,
    TIME_FIRST: _time_first,
    KEYWORDS: _keywords,
    EDM: _edm,
    DIFFUSERS: _diffusers,
}
"""``plain``: ``net(x, t, labels)``. ``time-first``: ``net(t, x, labels)``. ``keywords``:
``net(x, t, class_cond=labels, ...)``, the call of k-diffusion's code. ``edm``: ``net(x, sigma, one_hot)``,
that of Karras et al., where no class is a row of zeros. ``diffusers``:
``net(x, timestep=t, class_labels=labels, ..., return_dict=False)[0]``."""

_TIMES = ("t", "time", "times", "timestep", "timesteps", "sigma", "noise_level")
_SAMPLES = ("x", "x_t", "xt", "sample", "samples", "input", "inputs", "img", "image")


def recognized_call(module: Any) -> str:
    """The name of the call that a module takes, by its attributes and the names of its arguments."""
    if hasattr(module, "img_resolution") and hasattr(module, "label_dim"):
        return EDM
    parameters = _parameters(module)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if names[:1] in (["sample"], ["hidden_states"]) and "timestep" in names and "return_dict" in names:
        return DIFFUSERS
    if len(names) > 1 and names[0] in _TIMES and names[1] in _SAMPLES:
        return TIME_FIRST
    if len(names) > 1 and (hasattr(module, "inner_model") or names[1] == "sigma"):
        keywords = "class_cond" in names or any(p.kind == p.VAR_KEYWORD for p in parameters)
        return KEYWORDS if keywords or hasattr(module, "inner_model") else PLAIN
    return PLAIN


def receives_sigma(module: Any) -> bool:
    """Whether one of the first two arguments of a module is called sigma, as in EDM's code."""
    return any(p.name == "sigma" for p in _parameters(module)[:2])


def check_arguments(module: Any, given: int) -> None:
    """Refuses a module that needs more than it would be given by ``net(x_t, t, labels)``.

    Args:
        module: The module.
        given: How many arguments it would be given.

    Raises:
        UserError: It has more arguments without a default.
    """
    needed = [
        p.name
        for p in _parameters(module)
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > given:
        raise UserError(
            f"a {type(module).__name__} needs more arguments than it would receive",
            got=f"forward({', '.join(needed)})",
            expected=f"{given} arguments: {', '.join(('x_t', 't', 'labels')[:given])}",
            fix="define the call: dm.as_denoiser(net, ..., call=call) with "
            'def call(net, x, t, conditions): return net(x, t, y=conditions["label"]). '
            "num_classes=N gives it labels, and conditioning={...} further conditions",
        )


def _parameters(module: Any) -> list[inspect.Parameter]:
    try:
        called = module.forward if isinstance(module, nn.Module) else module
        return list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):  # of functions written in C nothing is known
        return []


class CalledNet(nn.Module):
    """A module of other code, called as networks are here: ``net(x, t, labels, name=...)``.

    Args:
        module: The module; it is used, not copied.
        call: A name of :data:`CALLS`, or a function.
        features: Names of the parts of the module whose outputs are its features.

    Raises:
        UserError: An unknown name.
    """

    listener: Listener | None = None

    def __init__(self, module: nn.Module, call: str | Call, features: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(call, str) and call not in CALLS:
            raise unknown_name("way to call a network", call, ("auto", *CALLS))
        for name in features:
            named_part(module, name)
        self.module = module
        self.call = call
        self.features = tuple(features)

    @property
    def has_features(self) -> bool:
        """Whether parts were named."""
        return bool(self.features)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        return_features: ReturnFeatures = False,
        **conditions: Tensor,
    ) -> Output:
        """The prediction (B, *shape) for ``x`` (B, *shape) at times ``t`` (B,).

        Features are the outputs of the named parts, tokens of images as maps; with ``"only"`` the pass stops
        when the last of them is computed.
        """
        if labels is not None:
            conditions[LABEL] = labels
        if not return_features:
            return self._prediction(x, t, conditions)

        def call() -> Tensor:
            return self._prediction(x, t, conditions)

        return features_of_pass(self.module, self.features, call, x, return_features, self.listener)

    def listen(self) -> None:
        """Prepares it for a compiler."""
        self.listener = Listener(self.module, self.features)

    def _prediction(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        call = CALLS[self.call] if isinstance(self.call, str) else self.call
        out: Tensor = call(self.module, x, t, conditions)
        # Networks with a learned variance return it behind the prediction.
        return out[:, : x.shape[1]] if self.call == DIFFUSERS and x.ndim == 4 else out


def module_of(net: Any) -> Any:
    """The module inside a :class:`CalledNet`, or the network itself."""
    return net.module if isinstance(net, CalledNet) else net
