"""Network pickles of EDM and EDM2 as teachers: read without running them, saved as safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, cause, unknown_name
from distmatch.base.files import load_into
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.denoiser import Output, ReturnFeatures, asked, has_features, on_prediction
from distmatch.diffusion.paths import edm, vp
from distmatch.interop.edm2_unet import EDM2UNet
from distmatch.interop.edm_config import ADM, EDM2, SONG, AnyConfig, EDM2Config, from_arguments
from distmatch.interop.edm_unet import EDMUNet
from distmatch.interop.inert_pickle import named_tensors, persistent, read_pickle, state_of
from distmatch.interop.times import HalfLog, Scaled
from distmatch.nets.edm import EDMDenoiser

Teacher = EDMDenoiser | PredictionDenoiser

_NETWORKS = {"SongUNet": SONG, "DhariwalUNet": ADM}
# Used in training only: augmentation labels, and EDM2's estimate of the loss.
_TRAINING_ONLY = ("map_augment.", "logvar_")


@dataclass(frozen=True)
class Preconditioning:
    """How a network of EDM becomes a denoiser.

    Attributes:
        kind: ``"edm"`` (EDM and EDM2), ``"vp"`` or ``"ve"`` (its reimplementations of Song et al. 2021).
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise level.
        sigma_max: Largest noise level.
        beta_d: VP: growth of beta over the unit of time.
        beta_min: VP: beta at the start.
        steps: VP: times that the network counts.
        epsilon: VP: smallest time.
    """

    kind: str = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000
    epsilon: float = 1e-5


class Negated(nn.Module):
    """A network whose output counts with the other sign.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def has_features(self) -> bool:
        """Whether the network has features."""
        return has_features(self.net)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, return_features: ReturnFeatures = False
    ) -> Output:
        """Minus the output of the network; its features as they are."""
        output = self.net(x, t, labels, **asked(return_features))
        return on_prediction(output, return_features, torch.neg)


def loaded_edm(
    config: AnyConfig, preconditioning: Preconditioning, tensors: Mapping[str, Tensor], source: str
) -> Teacher:
    """The denoiser of a config with the weights in ``tensors``, in eval mode.

    Names and shapes are compared before any memory is taken: a config may describe a network of any size.

    Raises:
        UserError: They do not belong together, or an unknown kind of preconditioning.
    """
    if config.num_blocks * len(config.channel_mult) > len(tensors):
        raise UserError(
            f"{source} belongs to another architecture",
            got=f"{len(tensors)} tensors for {config.num_blocks} blocks at each of "
            f"{len(config.channel_mult)} resolutions",
            fix="use the config that was saved with it",
        )
    try:
        with torch.device("meta"):
            teacher = build_edm(config, preconditioning)
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise UserError(f"{source} describes a network that cannot be built", got=cause(error)) from error
    net = network_of(teacher)
    if net is not None:
        load_into(net, tensors, source)
    return teacher.eval()


def build_edm(config: AnyConfig, preconditioning: Preconditioning) -> Teacher:
    """The denoiser of a config, with fresh weights; torch's global random stream stays where it was.

    Raises:
        UserError: An unknown kind of preconditioning.
    """
    with torch.random.fork_rng(devices=[]):
        net: nn.Module = EDM2UNet(config) if isinstance(config, EDM2Config) else EDMUNet(config)
    with torch.device("cpu"):  # a path keeps tensors, and they are numbers even where the network has none
        return _preconditioned(net, config, preconditioning)


def _preconditioned(net: nn.Module, config: AnyConfig, preconditioning: Preconditioning) -> Teacher:
    """The denoiser around a network of EDM."""
    p = preconditioning
    shape = (config.channels, config.resolution, config.resolution)
    common: dict[str, Any] = {
        "shape": shape,
        "num_classes": config.num_classes,
        "sigma_data": p.sigma_data,
    }
    if p.kind == "edm":
        return EDMDenoiser(net, sigma_min=p.sigma_min, sigma_max=p.sigma_max, **common)
    if p.kind == "vp":
        path = vp(p.beta_min, p.beta_min + p.beta_d, t_min=p.epsilon)
        denoiser = PredictionDenoiser(net, path, "eps", time=Scaled(p.steps - 1.0), **common)
    elif p.kind == "ve":
        # D = x + sigma F: the network predicts minus the noise.
        path = edm(p.sigma_min, p.sigma_max)
        denoiser = PredictionDenoiser(Negated(net), path, "eps", time=HalfLog(), **common)
    else:
        raise unknown_name("preconditioning", p.kind, ("edm", "vp", "ve"))
    denoiser.preconditioning = p  # type: ignore[assignment]
    return denoiser


def network_of(teacher: nn.Module) -> EDMUNet | EDM2UNet | None:
    """The network of EDM or EDM2 inside a denoiser; None for another."""
    net = getattr(teacher, "net", None)
    net = net.net if isinstance(net, Negated) else net
    return net if isinstance(net, (EDMUNet, EDM2UNet)) else None


def read_edm(path: str | os.PathLike[str]) -> tuple[Teacher, dict[str, Any]]:
    """The averaged network (``ema``) of a pickle of EDM or EDM2; nothing in the file is run.

    Args:
        path: The ``.pkl``.

    Returns:
        The denoiser, float32, in eval mode; and the class that was read, with how its latents are scaled.

    Raises:
        UserError: Not such a file, or a network that is not one of theirs.
    """
    content = read_pickle(path)
    outer = content.get("ema") if isinstance(content, Mapping) else None
    found = persistent(outer)
    if found is None:
        raise UserError(
            f"{path} contains no EMA network of EDM",
            got=sorted(map(str, content))[:20] if isinstance(content, Mapping) else type(content).__name__,
            expected="a dictionary with the network under 'ema'",
        )
    try:
        teacher = _rebuilt(*found, str(path))
        return teacher, {"class": found[0], **_encoding(content)}
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} does not describe its network in EDM's format",
            got=cause(error),
        ) from error


def _rebuilt(name: str, state: Mapping[str, Any], source: str) -> Teacher:
    """The denoiser that a recorded outer network describes, float32, in eval mode."""
    config, preconditioning, inner = _understood(name, state)
    tensors = {key: value for key, value in named_tensors(inner) if not key.startswith(_TRAINING_ONLY)}
    return loaded_edm(config, preconditioning, tensors, source)


def _understood(name: str, state: Mapping[str, Any]) -> tuple[AnyConfig, Preconditioning, Any]:
    """Config, preconditioning and inner network of a recorded outer network."""
    arguments, modules = _table(state, "_init_kwargs"), _table(state, "_modules")
    kinds = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "Precond": "edm"}
    if name not in kinds:
        raise UserError(
            f"a network of class {name[:80]!r} is not supported",
            expected=", ".join(kinds),
            fix="iDDPM's networks predict a variance on another grid; wrap them with dm.as_denoiser",
        )
    if name == "Precond":
        architecture, inner = EDM2, modules.get("unet")
    else:
        inner = modules.get("model")
        recorded = persistent(inner)
        architecture = _NETWORKS.get(recorded[0] if recorded else "", "")
    if inner is None or not architecture:
        raise UserError("the network inside is not one of EDM's", expected=", ".join((*_NETWORKS, "UNet")))
    defaults = Preconditioning()
    kind = kinds[name]
    low, high = float(state.get("sigma_min", 0.0)), float(state.get("sigma_max", float("inf")))
    preconditioning = Preconditioning(
        kind=kind,
        sigma_data=float(state.get("sigma_data", 0.5)),
        # EDM states 0 and infinity, and samples between 0.002 and 80.
        sigma_min=low if low > 0 else defaults.sigma_min,
        sigma_max=high if high < float("inf") else defaults.sigma_max,
        beta_d=float(state.get("beta_d", defaults.beta_d)),
        beta_min=float(state.get("beta_min", defaults.beta_min)),
        steps=int(state.get("M", defaults.steps)),
        epsilon=float(state.get("epsilon_t", defaults.epsilon)),
    )
    inner_arguments = _table(state_of(inner), "_init_kwargs")
    return from_arguments(architecture, {**arguments, **inner_arguments}), preconditioning, inner


def _table(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = state.get(name)
    return dict(value) if isinstance(value, Mapping) else {}


# What EDM2's encoder takes for granted of the latents of Stable Diffusion's autoencoder.
_LATENTS = {
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0.0,
    "final_std": 0.5,
}


def _encoding(content: Mapping[str, Any]) -> dict[str, Any]:
    """Scale and shift of each channel of the latents that EDM2 was trained on; {} for a teacher on pixels."""
    found = persistent(content.get("encoder"))
    if found is None or found[0] != "StabilityVAEEncoder":
        return {}
    said = {**_LATENTS, **_table(found[1], "_init_kwargs")}
    values = [said[key] for key in ("raw_mean", "raw_std", "final_mean", "final_std")]
    parts = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    if not all(len(part) in (1, 4) and all(type(n) in (int, float) for n in part) for part in parts):
        raise UserError("the encoder in this pickle is of an unknown form", got="numbers of another kind")
    mean, std, final, spread = (torch.tensor(part, dtype=torch.float64) for part in parts)
    scale = spread / std
    shift = mean - final / scale
    return {"latents": {"scale": scale.tolist(), "shift": shift.tolist(), "pixels": "0 to 1"}}


def is_network_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file that only :func:`read_edm` may open."""
    return Path(path).is_file() and Path(path).suffix.lower() in (".pkl", ".pickle")
