"""Any network of the user's as a denoiser: its call is recognized or given."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from distmatch.base.errors import UserError, unknown_name
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.calls import (
    EDM,
    KEYWORDS,
    PLAIN,
    TIME_FIRST,
    Call,
    CalledNet,
    check_arguments,
    receives_sigma,
    recognized_call,
)
from distmatch.diffusion.paths.core import NoisePath


def as_denoiser(
    module: Callable[..., Any],
    path: str | NoisePath | None = None,
    prediction: str | None = None,
    *,
    shape: Sequence[int] | None = None,
    call: str | Call = "auto",
    features: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> PredictionDenoiser:
    """Makes a teacher of your own network; a student of it starts as a copy of the network.

    How a module is called is recognized by the names of its arguments: ``net(x_t, t)``; with ``num_classes``,
    ``net(x_t, t, labels)``; with ``conditioning``, ``net(x_t, t, name=...)``; with time first; or as EDM,
    k-diffusion or diffusers call theirs. Any other call is defined by a short function::

        def call(net, x, t, conditions):
            return net(x, noise=t.log() / 4, y=conditions["label"])

    Args:
        module: The network. A function will do for a teacher; its parameters are not found, so that a student
            of it is a fresh network.
        path: The noise path that it was trained on, or its name; by default ``edm`` for a network with an
            argument ``sigma``, as those of EDM and k-diffusion have, and ``vp`` for others.
        prediction: What it predicts: "x0", "eps", "v", "flow" or "score"; by default "x0" and "eps".
        shape: Shape of one sample. Networks of EDM's code say it themselves.
        call: ``auto``; ``plain`` or a name of :data:`~distmatch.diffusion.calls.CALLS`; or a function.
        features: Names of parts of the module, such as ``("mid_block",)``, whose outputs a discriminator can
            learn on: vectors, maps, or tokens of images.
        arguments: What the class of the module was made with, as JSON values by name. They are kept with a
            saved model, so that it can be loaded with the class alone.
        options: The other arguments of :class:`PredictionDenoiser`.

    Returns:
        A denoiser. It has features where parts are named, or where the module has an attribute
        ``has_features`` that is True and takes ``return_features``.

    Raises:
        UserError: No shape, arguments that are no JSON, a module that needs more than it would be given.
    """
    chosen = call if call != "auto" else recognized_call(module) if isinstance(module, nn.Module) else PLAIN
    if chosen == EDM:
        size, channels = getattr(module, "img_resolution", None), getattr(module, "img_channels", None)
        shape = (channels, size, size) if shape is None and size and channels else shape
        if "conditioning" not in options:
            options.setdefault("num_classes", int(getattr(module, "label_dim", 0)))
    clean = chosen in (EDM, KEYWORDS) or (chosen in (PLAIN, TIME_FIRST) and receives_sigma(module))
    if clean and hasattr(module, "sigma_data"):
        options.setdefault("sigma_data", float(module.sigma_data))
    if shape is None:
        raise UserError(
            "the shape and scale of the network's samples are not known",
            got=f"a {type(module).__name__}",
            fix="pass shape=(channels, height, width), or shape=(numbers,) for vectors",
        )
    try:
        kept = None if arguments is None else json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            "the arguments of a network must be JSON values, since they are saved in a file",
            got=str(error),
            expected="numbers, strings, true, false, null, and lists and tables of them",
            fix="omit arguments; loading the saved model then needs the network",
        ) from error
    known = inspect.signature(PredictionDenoiser).parameters.keys()
    if unknown := sorted(options.keys() - known):
        raise unknown_name("option of as_denoiser", unknown[0], sorted(known - {"net"}))
    net = module
    if chosen != PLAIN or features:
        if not isinstance(module, nn.Module):
            raise UserError("call= and features= are for modules", got=type(module).__name__)
        net = CalledNet(module, chosen, features)
    denoiser = PredictionDenoiser(
        net,
        path if path is not None else "edm" if clean else "vp",
        prediction if prediction is not None else "x0" if clean else "eps",
        shape=shape,
        **options,
    )
    if chosen == PLAIN and not denoiser.by_name and isinstance(module, nn.Module):
        check_arguments(module, 3 if denoiser.num_classes else 2)
    denoiser.arguments = kept
    return denoiser
