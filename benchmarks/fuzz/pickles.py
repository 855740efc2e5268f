"""Network pickles: changed bytes, opcodes and options of valid ones, and streams of opcodes from nothing.

Inputs that reach new lines of the reader are kept and changed further.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import random
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from harness import Case, Lines, command_line, scratch
from values import changed_value, hostile

from distmatch.interop import edm_checkpoint, edm_config, inert_pickle, pickle_machine
from distmatch.interop.edm_checkpoint import Preconditioning, build_edm, read_edm
from distmatch.interop.edm_config import from_arguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.edm_pickles import write_pickle

TRACED = 12  # one case in so many is traced
MOST_KEPT = 400
NAMES = """
collections OrderedDict,builtins set,builtins frozenset,builtins object,builtins slice,dnnlib.util EasyDict,
_codecs encode,torch Size,torch._utils _rebuild_tensor,torch._utils _rebuild_tensor_v2,torch FloatStorage,
torch._utils _rebuild_parameter,torch.storage _load_from_bytes,torch.cuda HalfStorage,torch float32,
torch.nn Linear,
torch_utils.persistence _reconstruct_persistent_obj,copyreg _reconstructor,os system,numpy dtype
""".replace("\n", "").split(",")
WORDS = "ema class_name EDMPrecond state _modules _parameters _buffers _init_kwargs model a sigma_min storage"
SIZES = {"img_resolution": 4, "img_channels": 1, "label_dim": 2, "model_channels": 4}
SIZES |= {"num_blocks": 1, "channel_mult": [1], "attn_resolutions": []}
NETWORKS = {  # by the name of the outer class and of the network: architecture, preconditioning, what it says
    ("EDMPrecond", "SongUNet"): ("song", "edm", {"sigma_min": 0, "sigma_max": float("inf")}),
    ("EDMPrecond", "DhariwalUNet"): ("adm", "edm", {"sigma_data": 0.5}),
    ("VPPrecond", "SongUNet"): (
        "song",
        "vp",
        {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    ),
    ("VEPrecond", "SongUNet"): ("song", "ve", {"sigma_min": 0.02, "sigma_max": 100}),
    ("Precond", "UNet"): ("edm2", "edm", {"sigma_data": 0.5, "logvar_channels": 8}),
}
BARE = b"()]}N\x88\x89.0012QRabdeilostu\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94"
NUMBERS = (0, 1, 2, 5, 255, 2**16, 2**31 - 1, -(2**31))


class Pickles:
    """Makes and checks the cases."""

    def __init__(self) -> None:
        self.folder = scratch()
        self.networks = {names: self._network(*names) for names in NETWORKS}
        self.whole = [self._written(*names, *self.networks[names]) for names in NETWORKS]
        for content in self.whole:
            self._read(content)
        small = {"ema": torch.nn.Linear(1, 1)}  # the opcodes of modules, and much faster to read
        self.corpus = [pickle.dumps(small, 2), pickle.dumps(small, 4), pickle.dumps(torch.ones(3), 2)]
        self.corpus.append(pickle.dumps({"ema": [1.5, None]}, 4))
        self.lines = Lines([m.__file__ for m in (edm_checkpoint, edm_config, inert_pickle, pickle_machine)])
        self.count = 0

    def _network(self, outer: str, inner: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """A small network of a class, the options that it was built with, and what its outer class says."""
        architecture, kind, said = NETWORKS[outer, inner]
        options = dict(SIZES) if architecture == "edm2" else {**SIZES, "model_type": inner}
        options |= {"channels_per_head": 4} if architecture == "edm2" else {}
        teacher = build_edm(from_arguments(architecture, options), Preconditioning(kind=kind))
        return teacher, options, said

    def _written(self, outer: str, inner: str, teacher: Any, options: Any, said: dict[str, Any]) -> bytes:
        """The network as a pickle."""
        path = self.folder / f"written-{os.getpid()}.pkl"
        slot = "unet" if inner == "UNet" else "model"
        write_pickle(path, teacher, outer, inner, options, slot=slot, **said)
        return path.read_bytes()

    def _read(self, content: bytes) -> None:
        path = self.folder / "case.pkl"
        path.write_bytes(content)
        read_edm(path)

    def _changed_options(self, rng: random.Random) -> bytes:
        """A network that says something else of itself than its weights do."""
        names = rng.choice(list(self.networks))
        teacher, options, said = self.networks[names]
        if rng.random() < 0.1:
            names = rng.choice(list(self.networks))
        changed = changed_value(rng, options, rng.randint(1, 2))
        said = {name: hostile(rng) if rng.random() < 0.2 else value for name, value in said.items()}
        return self._written(*names, teacher, changed if isinstance(changed, dict) else options, said)

    def make(self, rng: random.Random, number: int) -> Case:
        """A case."""
        kind = rng.random()
        if kind < 0.35:
            return Case("generated", self._generated(rng))
        if kind < 0.4:
            return Case("options", self._changed_options(rng))
        # Whole networks are read slowly: they are one in ten.
        source = rng.choice(self.whole if rng.random() < 0.1 else self.corpus)
        if kind < 0.7:
            return Case("bytes", self._changed_bytes(rng, source))
        return Case("opcodes", self._changed_opcodes(rng, source))

    def _changed_bytes(self, rng: random.Random, source: bytes) -> bytes:
        raw = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] = rng.randrange(256)
                case 1:
                    raw[at] ^= 1 << rng.randrange(8)
                case 2:
                    raw[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 255, 2**16, 2**31, 2**32 - 1)))
                case _:
                    del raw[at : at + rng.randint(1, 20)]
            raw = raw or bytearray(b".")
        return bytes(raw)

    def _changed_opcodes(self, rng: random.Random, source: bytes) -> bytes:
        """Opcodes left out, repeated, exchanged, or new ones put between."""
        try:
            places = [place or 0 for _, _, place in pickletools.genops(source)]
        except Exception:
            return self._changed_bytes(rng, source)
        parts = [source[a:b] for a, b in zip(places, [*places[1:], len(source)], strict=True)]
        for _ in range(rng.randint(1, 5)):
            at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
            match rng.randrange(5):
                case 0:
                    parts[at] = b""
                case 1:
                    parts[at] = parts[other]
                case 2:
                    parts[at], parts[other] = parts[other], parts[at]
                case 3:
                    parts[at] = self._opcode(rng) + parts[at]
                case _:
                    parts[at] *= rng.choice((2, 3, 50))
        return b"".join(parts)

    def _generated(self, rng: random.Random) -> bytes:
        body = b"".join(self._opcode(rng) for _ in range(rng.choice((5, 20, 100))))
        return b"\x80\x04" + body + b"."

    def _opcode(self, rng: random.Random) -> bytes:
        number = rng.choice(NUMBERS)
        match rng.randrange(14):
            case 0:
                return b"c" + rng.choice(NAMES).replace(" ", "\n").encode() + b"\n"
            case 1 | 2:
                word = rng.choice(WORDS.split()).encode()
                return b"X" + struct.pack("<I", len(word)) + word
            case 3:
                return b"J" + struct.pack("<i", number)
            case 4:
                return b"K" + bytes([rng.randrange(256)])
            case 5:
                return rng.choice((b"q", b"h")) + bytes([rng.randrange(8)])
            case 6:
                return rng.choice((b"r", b"j")) + struct.pack("<i", number)
            case 7:
                raw = rng.choice((b"", b"x" * 8, pickle.dumps(0x1950A86A20F9469CFC6C, 2)))
                return b"B" + struct.pack("<I", len(raw)) + raw
            case 8:
                return b"G" + struct.pack(">d", rng.choice((0.5, float("nan"), 1e308)))
            case _:
                return bytes([rng.choice(BARE)])

    def check(self, case: Case) -> None:
        """Reads a case as a teacher; one in a few with a look at the lines it reaches."""
        self.count += 1
        if self.count % TRACED:
            self._read(case.content)
            return
        try:
            with self.lines.watch():
                self._read(case.content)
        finally:
            if self.lines.new and len(self.corpus) < MOST_KEPT:
                self.corpus.append(case.content)


def main() -> int:
    """Runs the cases that the command line asks for."""
    cases = Pickles()
    return command_line(__doc__ or "", cases.make, cases.check)


if __name__ == "__main__":
    sys.exit(main())
