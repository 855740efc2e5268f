"""Saved models and folders of diffusers whose config, index or tensor header was changed.

Values are exchanged for others of any type and size, left out, nested, or changed byte by byte.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

from harness import Case, command_line, scratch

from distmatch.base.files import read_json
from distmatch.interop import load_denoiser, save_denoiser
from distmatch.interop.diffusers_parts import check_components, network_like, scheduler_from
from distmatch.interop.diffusers_schedule import SCHEDULERS, read_schedule
from distmatch.interop.edm_checkpoint import Preconditioning, build_edm
from distmatch.interop.edm_config import EDM2Config, EDMConfig
from distmatch.interop.optional import import_diffusers
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser

NASTY = (None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e308, float("nan"), float("inf"), 10**6, 10**9, 10**12)
NASTY += (2**31, 2**62, 2**63, 10**30, "", "a", "\x00", "nan", "../x", "x" * 10_000, [], {}, [1], [[1]])
NASTY += ([-1] * 3, [1] * 2000, [10**9] * 2, {"a": {"b": [1]}}, ["auto"], [None])
NEW_KEYS = ("extra_key", "kind", "path", "jumps", "latents", "_class_name", "prediction", "pfgm_dims")
DTYPES = ("F16", "BF16", "F64", "I8", "U8", "F8_E4M3", "BOOL", "C64", "I64")


class Configs:
    """Makes and checks the cases."""

    def __init__(self) -> None:
        self.folder = scratch()
        self.models = [self._saved(f"m{i}", denoiser) for i, denoiser in enumerate(_denoisers())]
        diffusers = import_diffusers()
        diffusers.logging.set_verbosity(60)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        dit = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8
        )
        self.networks = [(json.loads(net.to_json_string()), net.state_dict()) for net in (unet, dit)]
        few = {"num_train_timesteps": 50}  # some schedulers spend 0.3 s on 1000
        self.schedulers = [
            dict(getattr(diffusers, name)(**few).config, _class_name=name) for name in SCHEDULERS
        ]
        self.schedulers = [json.loads(json.dumps(config, default=list)) for config in self.schedulers]
        self.index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}

    def _saved(self, name: str, denoiser: Any) -> Path:
        place = self.folder / name
        save_denoiser(place, denoiser, {"kind": "teacher", "data": {"spec": "digits"}})
        return place

    def make(self, rng: random.Random, number: int) -> Case:
        """A case: its label says what is read, its content is the changed file."""
        kind = rng.random()
        if kind < 0.45:
            at = rng.randrange(len(self.models))
            text = (self.models[at] / "config.json").read_text()
            return Case(f"config {at}", _changed(rng, json.loads(text)))
        if kind < 0.55:
            at = rng.randrange(len(self.models))
            whole = (self.models[at] / "model.safetensors").read_bytes()
            return Case(f"tensors {at}", _changed_header(rng, whole))
        if kind < 0.8:
            return Case("scheduler", _changed(rng, rng.choice(self.schedulers)))
        if kind < 0.96:
            return Case("index", _changed(rng, self.index))
        at = rng.randrange(len(self.networks))
        return Case(f"network {at}", _changed(rng, self.networks[at][0]))

    def check(self, case: Case) -> None:
        """Reads the case where it belongs."""
        kind, _, at = case.label.partition(" ")
        if kind in ("config", "tensors"):
            place = self.folder / "case"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self.models[int(at)], place)
            name = "config.json" if kind == "config" else "model.safetensors"
            (place / name).write_bytes(case.content)
            load_denoiser(place)
            return
        place = self.folder / "other"
        place.mkdir(exist_ok=True)
        (place / "model_index.json").write_bytes(case.content)
        if kind == "index":
            check_components(place)
            return
        config = read_json(place / "model_index.json")
        if kind == "scheduler":
            read_schedule(scheduler_from(config))
        else:
            tensors = self.networks[int(at)][1]
            network_like(config, ("UNet2DModel", "DiTTransformer2DModel"), tensors, "the case")


def _denoisers() -> list[Any]:
    common = {"sigma_data": 0.5, "num_classes": 2}
    mlp = EDMDenoiser(build_net(MLPConfig(width=8, depth=1), (2,), 2), shape=(2,), **common)
    unet = build_net(UNetConfig(width=4, multipliers=(1, 1), blocks=1), (1, 4, 4), 2)
    dit = build_net(DiTConfig(patch=2, width=8, depth=1, heads=1), (1, 4, 4), 2)
    images = [EDMDenoiser(net, shape=(1, 4, 4), **common) for net in (unet, dit)]
    sizes = {"resolution": 4, "channels": 1, "num_blocks": 1, "channel_mult": (1,), "attn_resolutions": ()}
    song = EDMConfig(architecture="song", model_channels=4, **sizes)  # type: ignore[arg-type]
    edm2 = EDM2Config(model_channels=4, channels_per_head=4, **sizes)  # type: ignore[arg-type]
    kinds = (Preconditioning(), Preconditioning(kind="vp"), Preconditioning(kind="ve"))
    return [mlp, *images, *(build_edm(song, kind) for kind in kinds), build_edm(edm2, kinds[0])]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree with every key of it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
    elif isinstance(value, list):
        found += [(value, index) for index in range(len(value))]
    for container, key in list(found):
        found += _places(container[key])
    return found


def _changed(rng: random.Random, config: Any) -> bytes:
    """A config with a few values changed; or some bytes of it."""
    config = copy.deepcopy(config)
    for _ in range(rng.randint(1, 3)):
        places = _places(config)
        if not places:
            break
        container, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1:
                other, where = rng.choice(places)
                container[key] = copy.deepcopy(other[where])
            case 2 if isinstance(container, dict):
                container[rng.choice(NEW_KEYS)] = rng.choice(NASTY)
            case _:
                container[key] = copy.deepcopy(rng.choice(NASTY))
    raw = bytearray(json.dumps(config).encode())
    if rng.random() < 0.1:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def _changed_header(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with another header, or of another length."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    if rng.random() < 0.2:
        return raw[: rng.randrange(len(raw))]
    if rng.random() < 0.3:
        name = rng.choice(list(header))
        header[name]["dtype"] = rng.choice(DTYPES)
        text = json.dumps(header).encode()
    else:
        text = _changed(rng, header)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + body


def main() -> int:
    """Runs the cases that the command line asks for."""
    cases = Configs()
    return command_line(__doc__ or "", cases.make, cases.check)


if __name__ == "__main__":
    sys.exit(main())
