"""TOML both ways and options from it."""

import json
import math
import struct
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmatch.base.errors import UserError
from distmatch.training.toml import dataclass_to_dict, read_toml, to_toml, with_values


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
class Noise:
    mean: float = -1.2
    std: float = 1.2


@dataclass(frozen=True)
class LongNoise(Noise):
    tail: Annotated[float, "a mark"] = 0.0


@dataclass(frozen=True)
class Options:
    steps: int = 1
    noise: Noise = field(default=Noise(), metadata={"key": "levels"})
    guidance: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    law: Annotated[Literal["none", "karras"] | None, "a mark"] = None
    hidden: tuple[int, ...] | None = None
    level: Literal[1, 2] = 1
    fused: bool = False
    label: str | None = None


FULL = Options(
    steps=10,
    noise=LongNoise(mean=-math.inf, tail=0.5),
    guidance=2.0,
    device="cpu",
    law="none",
    hidden=(1, 2),
    level=2,
    fused=True,
    label="none",
)


@pytest.mark.parametrize("options", [FULL, Options(), Options(noise=LongNoise(tail=3.0), hidden=())])
def test_options_survive_the_file_and_json(options):
    plain, begin = dataclass_to_dict(options), Options(noise=type(options.noise)())
    assert "levels" in plain
    assert with_values(begin, tomllib.loads(to_toml(plain)), where="config.toml") == options
    given = {key: value for key, value in json.loads(json.dumps(plain)).items() if value is not None}
    assert with_values(begin, given) == options


def test_missing_keys_keep_what_they_were_and_ints_are_floats():
    got = with_values(FULL, {"steps": 3, "levels": {"mean": 1}, "guidance": 2})
    assert got == replace(FULL, steps=3, noise=LongNoise(mean=1.0, tail=0.5), guidance=2.0)
    assert [type(x) for x in (got.noise.mean, got.guidance)] == [float] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, r"unknown option in config\.toml\. Got: 'stepz'.*did you mean steps\?"),
        ({"levels": {"meen": 1}}, r"unknown option in config\.toml \[levels\].*did you mean mean\?"),
        ({"noise": {"mean": 1}}, r"unknown option in config\.toml\. Got: 'noise'"),
        ({"steps": "ten"}, r"wrong value for steps in config\.toml\. Got: 'ten' \(str\)\. Expected: int"),
        ({"steps": 3.0}, r"wrong value for steps.*3\.0 \(float\).*int"),
        ({"steps": True}, r"wrong value for steps.*True \(bool\).*int"),
        ({"fused": 1}, r"wrong value for fused.*1 \(int\).*bool"),
        ({"levels": 3}, r"wrong value for levels.*a table of options of Noise"),
        ({"levels": {"std": []}}, r"wrong value for levels\.std.*float"),
        ({"device": "cdua"}, r"unknown value of config\.toml \[device\].*did you mean cuda"),
        ({"law": "nine"}, r"unknown value of config\.toml \[law\].*did you mean none"),
        ({"level": True}, r"unknown value of config\.toml \[level\].*one of 1, 2"),
        ({"hidden": 3}, r"wrong value for hidden"),
        ({"hidden": [1, 2.5]}, r"wrong value for hidden\[1\].*int"),
        ({"hidden": {"a": 1}}, r"wrong value for hidden.*a table"),
        ({"guidance": "strong"}, r"wrong value for guidance.*float"),
    ],
)
def test_mistakes_are_told_by_key_got_and_expected(change, message):
    with pytest.raises(UserError, match=message):
        with_values(Options(), change, where="config.toml")


def test_options_are_a_table():
    with pytest.raises(UserError, match="a table of options of Options"):
        with_values(Options(), [])
