"""Network pickles with the layout of EDM's: modules that pickle their class name, source text and state."""

import pickle
import sys
import types
from contextlib import contextmanager

import torch
from torch import nn

from distmatch.interop.edm_blocks import Conv
from distmatch.interop.edm_checkpoint import Preconditioning, build_edm, network_of
from distmatch.interop.edm_config import from_arguments

SOURCE = "raise RuntimeError('source text of a pickle was run')"
SMALL = {"img_resolution": 8, "img_channels": 3, "label_dim": 2, "num_blocks": 1}
SMALL |= {"channel_mult": [1, 2], "attn_resolutions": [4]}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
NCSNPP |= {"resample_filter": [1, 3, 3, 1]}

EDM_CASES = {
    "edm": ("EDMPrecond", {"model_type": "SongUNet", "model_channels": 16, "augment_dim": 9, **NCSNPP}),
    "adm": ("EDMPrecond", {"model_type": "DhariwalUNet", "model_channels": 64}),
    "vp": ("VPPrecond", {"model_type": "SongUNet", "model_channels": 16}),
    "ve": ("VEPrecond", {"model_type": "SongUNet", "model_channels": 16, **NCSNPP}),
}


class EasyDict(dict):
    """The dictionary class that EDM pickles its options with."""


def _reconstruct_persistent_obj(meta):
    raise RuntimeError("a persistent object was reconstructed")


class Persistent(nn.Module):
    """Pickles like an object of EDM's persistent classes."""

    def __init__(self, class_name, arguments, **attributes):
        super().__init__()
        self.class_name = class_name
        self._init_args, self._init_kwargs = (), EasyDict(arguments)
        self.__dict__.update(attributes)

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "class_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": self.class_name, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


@contextmanager
def their_modules():
    """Their module names, for as long as a pickle is written."""
    places = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    before = {thing: thing.__module__ for thing in places.values()}
    for name, thing in places.items():
        for part in (name.split(".")[0], name):
            sys.modules[part] = types.ModuleType(part)
        setattr(sys.modules[name], thing.__name__, thing)
        thing.__module__ = name
    yield
    for thing, name in before.items():
        thing.__module__ = name
    for name in places:
        for part in (name.split(".")[0], name):
            sys.modules.pop(part, None)


def stand_in(module, class_name="Layer", arguments=(), **attributes):
    """A module tree with the same tensors, of persistent and plain modules as in EDM."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: stand_in(child) for name, child in module.items()})
    out = Persistent(class_name, dict(arguments), **attributes)
    for name, value in module.named_parameters(recurse=False):
        out.register_parameter(name, value)
    for name, value in module.named_buffers(recurse=False):
        out.register_buffer(name, value, persistent=name not in module._non_persistent_buffers_set)
    if isinstance(module, Conv) and module.resample_filter is None:
        out.register_buffer("resample_filter", None)
    for name, child in module.named_children():
        out.add_module(name, stand_in(child))
    return out


def write_pickle(path, teacher, outer, inner, arguments, *, slot="model", extra=None, **attributes):
    """A pickle of ``teacher`` as EDM would have written it.

    ``outer`` and ``inner`` are class names, ``arguments`` what the outer network was built with.
    """
    net = network_of(teacher)
    whole = Persistent(outer, arguments, **attributes)
    known = {k: v for k, v in arguments.items() if k not in ("use_fp16", "model_type", "sigma_data")}
    whole.add_module(slot, stand_in(net, inner, known))
    with their_modules(), open(path, "wb") as file:
        pickle.dump({"ema": whole, "dataset_kwargs": EasyDict(path="x"), **(extra or {})}, file)
    return path


def fill(net):
    """Weights that any machine computes alike, by the alphabet of their names."""
    state = net.state_dict()
    names = sorted(name for name in state if "resample_filter" not in name)
    for index, name in enumerate(names):
        wave = torch.sin(torch.arange(state[name].numel(), dtype=torch.float64) * 0.7 + index) * 0.2
        state[name].copy_(wave.reshape(state[name].shape))


def teacher_and_pickle(folder, case):
    """A small teacher of one of ``EDM_CASES``, and the pickle of it in ``folder``."""
    torch.manual_seed(1)
    outer, options = EDM_CASES[case]
    arguments = {**SMALL, "use_fp16": True, **options}
    inner = arguments["model_type"]
    config = from_arguments("adm" if inner == "DhariwalUNet" else "song", arguments)
    kind = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}[outer]
    ends = {"ve": (0.02, 100.0)}.get(kind, (0.002, 80.0))
    teacher = build_edm(config, Preconditioning(kind=kind, sigma_min=ends[0], sigma_max=ends[1])).eval()
    said = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}
    said = {"sigma_min": 0.02, "sigma_max": 100} if kind == "ve" else said
    said = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5} if kind == "vp" else said
    path = write_pickle(folder / f"{case}.pkl", teacher, outer, inner, arguments, **said)
    return teacher, path
