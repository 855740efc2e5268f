"""TOML both ways and options from it."""

import json
import math
import struct
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmatch.base.errors import UserError
from distmatch.training.toml import dataclass_to_dict, dict_to_dataclass, read_toml, to_toml


def exact(value):
    """A form in which equality is equality to the bit, types included."""
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    if isinstance(value, list):
        return [exact(v) for v in value]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    return (type(value), value)


text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = text | st.integers() | st.booleans() | st.floats()
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=8
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(text, values, max_size=4))
def test_whatever_is_written_reads_back_exactly(tree):
    assert exact(tomllib.loads(to_toml(tree))) == exact(tree)


def test_layout_a_person_can_edit():
    tree = {
        "student": {"lr": 1e-4, "noise": {"mean": -1.2}, "hidden": (64, 64)},
        "steps": 2000,
        "out": Path("runs/a"),
        "teacher": None,
        "clip": math.inf,
    }
    assert to_toml(tree) == (
        'steps = 2000\nout = "runs/a"\nclip = inf\n\n'
        "[student]\nlr = 0.0001\nhidden = [64, 64]\n\n[student.noise]\nmean = -1.2\n"
    )
    assert to_toml({}) == ""


@pytest.mark.parametrize("bad", [{"a": {"b": 1j}}, {"a": {"b": [None]}}, {"a": {"b": [{"c": object()}]}}])
def test_what_toml_cannot_hold_is_refused_by_name(bad):
    with pytest.raises(TypeError, match=r"a\.b"):
        to_toml(bad)
    with pytest.raises(TypeError, match="key 1"):
        to_toml({1: 2})
    with pytest.raises(UserError, match=r"a\.b"):  # a name that the user chose
        to_toml({"a": {"b": "\ud800"}})


def test_broken_files_are_named_with_the_line(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("steps = 3\n\nlr = 1e-4 or so\nbatch = 4\n")
    with pytest.raises(UserError, match=r"config\.toml is not valid TOML.*line 3.*'lr = 1e-4 or so'"):
        read_toml(file)
    file.write_bytes(b"a = '\xff'")
    with pytest.raises(UserError, match="is not text"):
        read_toml(file)
    file.write_text('a = "unfinished')
    with pytest.raises(UserError, match="not valid TOML"):
        read_toml(file)
    with pytest.raises(UserError, match="is missing"):
        read_toml(tmp_path / "other.toml")
    with pytest.raises(UserError, match="not a regular file"):
        read_toml(tmp_path)


@dataclass(frozen=True)
class MLP:
    kind: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = (64, 64)
    label_dim: int | None = None


@dataclass(frozen=True)
class UNet:
    kind: Literal["unet"] = "unet"
    channels: int = 32


@dataclass(frozen=True)
class Noise:
    mean: float = -1.2
    std: float = 1.2


@dataclass(frozen=True)
class Options:
    steps: int
    net: MLP | UNet = field(default_factory=MLP)
    noise: Noise = Noise()
    extra_noise: Noise | None = None
    out: Path = Path("runs/x")
    teacher: Path | None = None
    guidance: float | None = 1.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    betas: tuple[float, float] = (0.9, 0.999)
    seeds: list[int] = field(default_factory=list)
    lr: float | Literal["auto"] = "auto"
    number: float | int = 0.5
    level: Literal[1, 2] = 1
    fused: bool = False
    label: str | None = None
    anything: Any = None
    by_bin: dict[str, float] = field(default_factory=dict)
    required: int | None = field(kw_only=True)


FULL = Options(
    steps=10,
    net=UNet(channels=8),
    noise=Noise(mean=-math.inf),
    extra_noise=Noise(std=2.0),
    teacher=Path("a b"),
    guidance=None,
    device="cpu",
    betas=(0.0, 0.5),
    seeds=[1, 2],
    lr=1e-3,
    number=3,
    level=2,
    fused=True,
    label="none",
    anything=[1],
    by_bin={"low": 1.0},
    required=None,
)


@pytest.mark.parametrize(
    "options", [FULL, Options(steps=1, required=2), Options(steps=1, net=MLP(hidden=()), required=2)]
)
def test_options_survive_the_file_and_json(options):
    plain = dataclass_to_dict(options)
    back = dict_to_dataclass(Options, tomllib.loads(to_toml(plain)), where="config.toml")
    assert back == options
    assert type(back.number) is type(options.number)
    assert type(back.lr) is type(options.lr)
    assert back == dict_to_dataclass(Options, json.loads(json.dumps(plain)))


def test_missing_keys_take_defaults_and_ints_are_floats():
    got = dict_to_dataclass(Options, {"steps": 3, "noise": {"mean": 1}, "guidance": 2, "by_bin": {"a": 1}})
    assert got == Options(steps=3, noise=Noise(mean=1.0), guidance=2.0, by_bin={"a": 1.0}, required=None)
    assert [type(x) for x in (got.noise.mean, got.guidance, got.by_bin["a"])] == [float] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, r"unknown option in config\.toml\. Got: 'stepz'.*did you mean steps\?"),
        ({"noise": {"meen": 1}}, r"unknown option in config\.toml \[noise\].*did you mean mean\?"),
        ({"steps": "ten"}, r"wrong value for steps in config\.toml\. Got: 'ten' \(str\)\. Expected: int"),
        ({"steps": 3.0}, r"wrong value for steps.*3\.0 \(float\).*int"),
        ({"steps": True}, r"wrong value for steps.*True \(bool\).*int"),
        ({"fused": 1}, r"wrong value for fused.*1 \(int\).*bool"),
        ({"noise": 3}, r"wrong value for noise.*a table of options of Noise"),
        ({"noise": {"std": []}}, r"wrong value for noise\.std.*float"),
        ({"extra_noise": {"std": "x"}}, r"wrong value for extra_noise\.std.*float"),
        ({"device": "cdua"}, r"unknown value of config\.toml \[device\].*did you mean cuda"),
        ({"level": True}, r"unknown value of config\.toml \[level\].*one of 1, 2"),
        ({"betas": [0.9]}, r"wrong value for betas.*a list of 2"),
        ({"betas": [0.9, "x"]}, r"wrong value for betas\[1\].*float"),
        ({"seeds": [1, 2.5]}, r"wrong value for seeds\[1\].*int"),
        ({"net": {"kind": "mlq"}}, r"unknown kind in config\.toml \[net\].*did you mean mlp\?"),
        ({"net": {"channels": 3}}, r"kind is missing in config\.toml \[net\].*mlp, unet"),
        ({"net": {"kind": "unet", "hidden": [3]}}, r"unknown option in config\.toml \[net\].*'hidden'"),
        ({"net": {"kind": ["mlp"]}}, r"unknown kind"),
        ({"lr": "fast"}, r"wrong value for lr.*float or Literal\['auto'\]"),
        ({"guidance": "strong"}, r"wrong value for guidance.*float"),
        ({"out": 3}, r"wrong value for out.*Path"),
        ({"by_bin": {"low": "x"}}, r"wrong value for by_bin\.low.*float"),
    ],
)
def test_mistakes_are_told_by_key_got_and_expected(change, message):
    with pytest.raises(UserError, match=message):
        dict_to_dataclass(Options, {"steps": 3, **change}, where="config.toml")


def test_a_missing_value_and_a_none_that_no_file_could_tell():
    with pytest.raises(UserError, match=r"steps is missing in config\.toml"):
        dict_to_dataclass(Options, {}, where="config.toml")
    with pytest.raises(UserError, match="a table of options of Options"):
        dict_to_dataclass(Options, [])

    with pytest.raises(TypeError, match="label may be the text 'none'"):
        dataclass_to_dict(Ambiguous(label=None))


@dataclass
class Ambiguous:
    label: str | None = "x"
