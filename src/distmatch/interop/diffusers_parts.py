"""The parts of a pipeline of diffusers: which of them are read, and each of them from its files.

A config may describe a network of any size. It is first built without memory, and must fit the weights that
are there; only then is it built in earnest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distmatch.base.errors import UserError, cause
from distmatch.base.files import read_json
from distmatch.interop.diffusers_net import MODELS
from distmatch.interop.diffusers_schedule import check_scheduler_name
from distmatch.interop.finite import check_finite
from distmatch.interop.optional import import_diffusers

CONFIG, SCHEDULER, INDEX = "config.json", "scheduler_config.json", "model_index.json"
NETWORKS = ("unet", "transformer")
DECODERS = ("vae", "vqvae")
AUTOENCODERS = ("AutoencoderKL", "VQModel")

_MOST_STEPS = 10_000  # training steps of a scheduler
_MOST_ORDERS = 100  # of its solver; diffusers has up to 4
_LARGEST = 2**31  # of any number in the config of a network
_MOST_ENTRIES = 1000  # of any list in it
_MOST_BUFFERS = 2**26  # numbers that a network computes from its config: positions
_TEXT = ("text_encoder", "tokenizer", "image_encoder", "bert", "prior", "movq")


def part(root: Path, names: Sequence[str], file: str, *, alone: bool = True) -> Path | None:
    """The folder of one part of a pipeline: a subfolder, or the root itself."""
    for name in names:
        if (root / name / file).is_file():
            return root / name
    return root if alone and (root / file).is_file() else None


def check_components(root: Path) -> None:
    """Accepts a pipeline if all of its components are supported; others may change the samples.

    Raises:
        UserError: It has another part, or reads text.
    """
    index, listed = parts_of(root)
    stored = {file.parent.name for file in root.glob(f"*/{CONFIG}")}
    unread = sorted((listed | stored) - {*NETWORKS, *DECODERS, "scheduler"})
    if any(is_text_part(name) for name in unread):
        raise UserError(
            f"{root} contains a pipeline that is conditioned on text or images, which is not read here",
            got=f"{str(index.get('_class_name', 'a pipeline'))[:80]} with {', '.join(unread)[:200]}",
            expected=f"a pipeline without condition or with classes: {' or '.join(MODELS)}",
            fix=f"dm.load_teacher traces such pipelines; or {_WRAP}",
        )
    if unread:
        raise UserError(
            f"{root} has a component that is not supported, and without it samples may be wrong",
            got=", ".join(unread)[:200],
            expected=f"{', '.join(NETWORKS)}, scheduler, {', '.join(DECODERS)}",
            fix="if the network does not need it, copy its folder and the scheduler's into a new one",
        )


def decoder_folder(root: Path) -> Path | None:
    """The folder of a pipeline's autoencoder; None for a pipeline without one.

    Raises:
        UserError: It has one that is not there: its samples would be latents, and look like small pictures.
    """
    place = part(root, DECODERS, CONFIG, alone=False)
    missing = sorted(parts_of(root)[1] & {*DECODERS})
    if place is None and missing:
        raise UserError(
            f"{root} lists an autoencoder that is not in it",
            got=f"no {missing[0]}/{CONFIG}",
            fix="copy the folder again, give the autoencoder's folder as vae, or pass vae=False for latents",
        )
    return place


def parts_of(root: Path) -> tuple[dict[str, Any], set[str]]:
    """The index of a pipeline, and the names of the parts that it lists."""
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    index = index if isinstance(index, dict) else {}
    return index, {n for n, v in index.items() if isinstance(v, list) and len(v) == 2 and v != [None, None]}


def is_text_part(name: str) -> bool:
    """Whether a part of a pipeline reads what it is conditioned on: text or images."""
    return name.startswith(_TEXT)


_WRAP = (
    "load it with diffusers, fix the text, and wrap it as a function of x and t: dm.as_denoiser("
    'lambda x, t: unet(x, t, text).sample, "vp", "eps", shape=(4, 64, 64), time=...)'
)


def load_network(folder: Path) -> Any:
    """The network in a folder, in float32.

    Raises:
        UserError: It is of another class, damaged, or a pickle.
    """
    name = _class_of(folder / CONFIG)
    if name not in MODELS:
        raise UserError(
            f"a {name[:80]} is not supported as a teacher",
            got=f"{folder / CONFIG}",
            expected=" or ".join(MODELS),
            fix=_WRAP,
        )
    return load_component(folder, name)


def load_autoencoder(folder: Path) -> Any:
    """The autoencoder in a folder, in float32.

    Raises:
        UserError: There is none that can be read.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} contains no autoencoder", expected=f"{CONFIG} and safetensors")
    name = _class_of(folder / CONFIG)
    if name not in AUTOENCODERS:
        raise UserError(
            "this autoencoder is not supported",
            got=f"{name[:80]} in {folder}",
            expected=" or ".join(AUTOENCODERS),
            fix="vae=False omits it: the samples are then its latents",
        )
    return load_component(folder, name)


def load_scheduler(folder: Path) -> Any:
    """The scheduler in a folder.

    Raises:
        UserError: There is none that can be read.
    """
    _class_of(folder / SCHEDULER)
    return scheduler_from(read_json(folder / SCHEDULER), str(folder / SCHEDULER))


def scheduler_from(config: Any, source: str = "the scheduler's config") -> Any:
    """The scheduler with a config.

    Raises:
        UserError: It is not one that is read, or diffusers cannot read it.
    """
    name = check_scheduler_name(config.get("_class_name") if isinstance(config, dict) else None)
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if type(steps) is not int or not 2 <= steps <= _MOST_STEPS:
        raise UserError(
            f"{source} has an invalid number of training steps",
            got=str(steps)[:80],
            expected=f"num_train_timesteps from 2 to {_MOST_STEPS}",
        )
    for kind in ("solver_order", "predictor_order", "corrector_order"):  # lengths of lists that are made
        order = config.get(kind, 1)
        if type(order) is not int or not 1 <= order <= _MOST_ORDERS:
            raise UserError(
                f"{source} has an invalid solver order",
                got=str(order)[:80],
                expected=f"{kind} from 1 to {_MOST_ORDERS}",
            )
    if betas is not None and not (isinstance(betas, list) and 2 <= len(betas) <= _MOST_STEPS):
        raise UserError(f"{source} has noise rates that are no list", expected="trained_betas: numbers")
    try:
        return getattr(import_diffusers(), name).from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # a class of another package, and a config that may hold anything
        raise UserError(f"diffusers cannot read {source}", got=cause(error)) from error


def network_like(config: Any, known: Sequence[str], tensors: Mapping[str, Tensor], source: str) -> Any:
    """A network built from a config, if its weights have these shapes.

    Raises:
        UserError: They are not, or it is a network of another class.
    """
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in known:
        raise UserError(
            "a class of diffusers that is not supported", got=str(name)[:80], expected=", ".join(known)
        )
    _check_size(str(name), config, [tuple(t.shape) for t in tensors.values()], source)
    return _built(str(name), config, "cpu", source)


def _check_size(name: str, config: dict[str, Any], shapes: list[tuple[int, ...]], source: str) -> None:
    """Refuses a network that is larger than its weights."""
    lists = [v for v in config.values() if isinstance(v, (list, tuple))]
    levels = max(map(len, lists), default=1)
    if levels > _MOST_ENTRIES or any(abs(number) > _LARGEST for number in _numbers(config)):
        raise UserError(f"the config of {source} has a list or a number beyond those of all networks")
    held, count = sum(map(math.prod, shapes)), len(shapes)
    # Each layer has tensors, and a U-Net has layers_per_block of them at each level at least.
    layers = max([1.0, *_numbers({key: config.get(key) for key in ("layers_per_block", "num_layers")})])
    if max(levels, layers) > count:
        raise _too_large(source, count, held)
    model = _built(name, config, "meta", source)
    # A part that is missing is named when the weights are loaded.
    if sum(p.numel() for p in model.parameters()) > 2 * held + 2**20:
        raise _too_large(source, count, held)
    if sum(b.numel() for b in model.buffers()) > held + _MOST_BUFFERS:
        raise _too_large(source, count, held)


def _numbers(config: Mapping[str, Any]) -> list[float]:
    """All numbers in a config and in its lists."""
    values = [
        v for value in config.values() for v in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _too_large(source: str, count: int, held: int) -> UserError:
    return UserError(
        f"the weights in {source} are not those of its config",
        got=f"{count} tensors with {held} numbers, fewer than the network has",
        fix="copy the folder again, with the config that was saved with the weights",
    )


def _built(name: str, config: dict[str, Any], device: str, source: str) -> Any:
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):  # loading draws no random number
            return getattr(import_diffusers(), name).from_config(config)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"diffusers cannot build the network of {source}", got=cause(error)) from error


def load_component(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of diffusers from safetensors, with parameters of one dtype and no copy in another."""
    files = sorted(f.name for f in folder.iterdir())
    safe = [f for f in files if f.endswith(".safetensors")]
    if not safe:
        pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            raise UserError(
                f"{folder / pickles[0]} is a pickle and was not opened: loading one can run any code",
                expected="diffusion_pytorch_model.safetensors",
                fix="save it with save_pretrained(folder, safe_serialization=True) where you trust it",
            )
        raise UserError(f"{folder} has no weights", expected="diffusion_pytorch_model.safetensors", got=files)
    # diffusion_pytorch_model.fp16.safetensors and its like: the part in the middle is the variant.
    middle = safe[0].removesuffix(".safetensors").split(".")[1:]
    variant = (
        middle[0].split("-")[0] if middle and "diffusion_pytorch_model.safetensors" not in safe else None
    )
    config = read_json(folder / CONFIG)
    _check_size(name, config, _shapes([folder / file for file in safe]), str(folder))
    try:
        # It fills the network with random numbers first; those of the caller stay as they were.
        with torch.random.fork_rng(devices=[]):
            kind = getattr(import_diffusers(), name)
            model, found = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                # diffusers insists on it for classes that keep some modules in float32.
                low_cpu_mem_usage=bool(getattr(kind, "_keep_in_fp32_modules", None))
                or dtype != torch.float32,
                variant=variant,
                torch_dtype=dtype,
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"diffusers cannot load {folder}", got=cause(error), fix="it may be truncated: copy it again"
        ) from error
    # diffusers would leave missing tensors at random values, with a warning.
    for what in ("missing_keys", "unexpected_keys"):
        if found[what]:
            raise UserError(
                f"the weights in {folder} are not those of its {CONFIG}",
                got=f"{len(found[what])} {what.replace('_', ' ')}, such as {sorted(found[what])[0]}",
                fix="copy the folder again, with the config that was saved with the weights",
            )
    # diffusers leaves the weights in the mapped file, where they begin at any byte. Kernels choose their way
    # by alignment: a resumed run would not repeat the first one bit for bit.
    for tensor in model.parameters():  # also of those that diffusers would keep in float32
        tensor.data = tensor.data.to(dtype, copy=True)
    for tensor in model.buffers():
        tensor.data = tensor.data.clone()
    check_finite(model, folder)
    return model


_FLOATS = ("F16", "BF16", "F32", "F64")


def _shapes(files: Sequence[Path]) -> list[tuple[int, ...]]:
    """The shapes of all tensors in safetensors files, from their headers.

    Raises:
        UserError: A file is damaged, or holds weights that are no real numbers of 16 bits or more.
    """
    shapes = []
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for key in handle.keys():  # noqa: SIM118
                    view = handle.get_slice(key)
                    counter = view.get_dtype() == "I64" and not view.get_shape()  # of batches
                    if view.get_dtype() not in _FLOATS and not counter:
                        raise UserError(
                            f"{file} has weights of a dtype that is not supported",
                            got=f"{key[:200]} of type {view.get_dtype()}",
                            expected=", ".join(_FLOATS),
                            fix="undo the quantization and save the weights as float32",
                        )
                    shapes.append(tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"diffusers cannot load {file}", got=cause(error), fix="it may be truncated: copy it again"
            ) from error
    return shapes


def _class_of(path: Path) -> str:
    config = read_json(path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{path} does not state its class", expected="an entry _class_name")
    return name
