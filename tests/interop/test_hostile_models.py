"""Models from elsewhere that were made to harm: nothing in them decides how much time or memory is taken."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from distmatch.base.errors import UserError
from distmatch.base.files import load_into, load_tensors, save_tensors
from distmatch.interop.edm_checkpoint import read_edm
from distmatch.interop.edm_config import config_from
from distmatch.interop.inert_pickle import named_tensors, read_pickle
from distmatch.interop.saved import load_denoiser, save_denoiser
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from tests.helpers.edm_pickles import SMALL, teacher_and_pickle, write_pickle

DOUBLING = b")" + b"2\x86" * 60  # () then sixty times (x, x): 60 objects, 2^60 of them to hash
STORAGE = pickle.dumps(torch.zeros(4), 2)


def opcode_streams():
    many = struct.pack("<I", 2**28)
    yield "memo", b"\x80\x02Nr" + many + b"."
    yield "key of tuples", b"\x80\x02}" + DOUBLING + b"Ns."
    yield "element of a set", b"\x80\x04\x8f(" + DOUBLING + b"\x90."
    yield "frozenset", b"\x80\x04(" + DOUBLING + b"\x91."
    yield "set from a list", b"\x80\x02cbuiltins\nset\n(](" + DOUBLING + b"etR."
    yield "tensor with a state", STORAGE[:-1] + b"(NNtb."
    yield "length beyond the file", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x."
    yield "endless number", b"\x80\x02\x8b" + struct.pack("<I", 10**5) + b"\x7f" * 10**5 + b"."
    text = b"X" + struct.pack("<I", 10**5) + b"a" * 10**5
    yield (
        "one text decoded again and again",
        b"\x80\x02" + text + b"q\x00(" + (b"c_codecs\nencode\nh\x00\x85R" * 4000) + b"t.",
    )


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in opcode_streams()])
def test_a_pickle_cannot_ask_for_more_than_it_holds(raw, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_pickle(tmp_path / "bad.pkl")
    assert len(str(caught.value)) < 1000


def module(children):
    """The opcodes of a recorded module with children: pairs of a name and opcodes."""
    entries = b"".join(b"X" + struct.pack("<I", len(name)) + name + child for name, child in children)
    return b"ctorch.nn\nX\n)\x81}X\x08\x00\x00\x00_modules}(" + entries + b"usb"


def test_modules_within_modules_end(tmp_path):
    twice = b"\x80\x02" + module([]) + b"q\x00"
    for index in range(60):  # each holds the one before it twice
        twice += b"0" + module([(b"a", b"h" + bytes([index])), (b"b", b"h" + bytes([index]))])
        twice += b"q" + bytes([index + 1])
    itself = b"\x80\x02ctorch.nn\nX\n)\x81q\x00}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00ssb"
    for raw in (twice, itself):
        (tmp_path / "bad.pkl").write_bytes(raw + b".")
        with pytest.raises(UserError, match="without an end"):
            list(named_tensors(read_pickle(tmp_path / "bad.pkl")))


HUGE = [
    {"num_blocks": 2_000_000_000},
    {"model_channels": 10**18},
    {"model_channels": 2**20, "channel_mult": [2**20]},
    {"label_dim": 10**12},
    {"label_dim": 2**20},
    {"channel_mult": [1] * 100_000},
    {"channel_mult_emb": 2**19},
    {"resample_filter": [1] * 20_000},
    {"resample_filter": [1, -1]},
    {"model_channels": 1},
    {"attn_resolutions": 7},
    {"img_resolution": "8"},
    {"dropout": float("nan")},
]


@pytest.mark.parametrize("change", HUGE, ids=lambda change: str(change)[:30])
def test_a_pickle_of_a_huge_or_degenerate_network_is_refused_before_it_is_built(change, tmp_path):
    teacher, _ = teacher_and_pickle(tmp_path, "edm")
    path = write_pickle(tmp_path / "x.pkl", teacher, "EDMPrecond", "SongUNet", {**SMALL, **change})
    with pytest.raises(UserError) as caught:
        read_edm(path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "change",
    [
        {"net": {"kind": "mlp", "width": 16, "depth": 10**9}},
        {"net": {"kind": "mlp", "width": 10**18, "depth": 1}},
        {"net": {"kind": "unet", "width": 8, "multipliers": [1] * 10**5}},
        {"net": {"kind": "x" * 10**6}},
        {"net": []},
        {"num_classes": 10**12},
        {"shape": [10**9, 10**9, 10**9]},
        {"shape": "abc"},
        {"sigma_min": "nan"},
        {"sigma_max": 1e400},
        {"extra": [1]},
        {"path": 3, "prediction": "eps"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_config_of_a_huge_network_is_refused_before_it_is_built(change, tmp_path):
    net = build_net(MLPConfig(width=16, depth=1), (2,), 0)
    save_denoiser(tmp_path / "m", EDMDenoiser(net, shape=(2,), num_classes=0))
    place = tmp_path / "m" / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        load_denoiser(tmp_path / "m")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
@pytest.mark.parametrize("every", [True, False])
def test_quantized_weights_are_refused(dtype, every, tmp_path):
    net = build_net(MLPConfig(width=16, depth=1), (2,), 0)
    save_denoiser(tmp_path / "m", EDMDenoiser(net, shape=(2,), num_classes=0))
    state = net.state_dict()
    odd = {k: v.to(dtype) if every or k == "last.weight" else v for k, v in state.items()}
    save_file(odd, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="undo the quantization"):
        load_denoiser(tmp_path / "m")


def test_memory_is_taken_when_shapes_are_known():
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match="another architecture"):
        load_into(empty, {"weight": torch.ones(3, 3), "bias": torch.ones(2)}, "here")
    assert empty.weight.is_meta
    load_into(empty, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "here")
    assert torch.equal(empty(torch.ones(1, 3)), torch.full((1, 2), 4.0))


def test_tied_weights_are_saved(tmp_path):
    one = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "t.safetensors", {"a": one, "b": one, "c": one[1]})
    back = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["a"], one)
    assert torch.equal(back["b"], one)
    assert torch.equal(back["c"], one[1])


def test_edm_configs_of_published_networks_are_within_the_bounds():
    # EDM2-XXL and ADM on ImageNet-64 (Karras et al. 2024, table 6; 2022, table 7).
    common = {"resolution": 64, "num_classes": 1000}
    config_from({"architecture": "edm2", "channels": 4, "model_channels": 448, **common})
    config_from(
        {"architecture": "adm", "channels": 3, "model_channels": 192, **common}
        | {"channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)}
    )
