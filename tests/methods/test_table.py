"""The table of methods: what it says of each is true, and the page shows it as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.methods.method import Method
from distmatch.methods.table import METHODS
from distmatch.training.options import DistillOptions

DOCS = Path(__file__).parents[2] / "docs"
ALL = list(METHODS.values())


def names_of(method: Method) -> str:
    return method.name


def test_the_page_shows_the_table_as_it_is() -> None:
    spec = importlib.util.spec_from_file_location("make_methods_table", DOCS / "make_methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (DOCS / "methods.md").read_text()
    assert script.page(text) == text, "run docs/make_methods_table.py"


@pytest.mark.parametrize("method", ALL, ids=names_of)
def test_every_entry_is_whole(method: Method) -> None:
    options = DistillOptions.of(method.name)
    assert method.summary
    assert method.limits
    assert "arXiv" in method.citation
    assert type(options.settings) is method.settings
    for field in dataclasses.fields(method.settings):
        assert field.default == getattr(method.settings, field.name), "a base class has another default"


@pytest.mark.parametrize("method", ALL, ids=names_of)
def test_a_name_is_one_option(method: Method) -> None:
    options = DistillOptions.of(method.name)
    names = ["data", "teacher", "method", "preset", "divergence"]
    for group in (options.settings, options.run, options.net):
        names += [f.name for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_a_setting_of_other_methods_is_refused_with_their_names() -> None:
    for name, other, readers in (
        ("sid_alpha", "dmd2", "sid, sida"),
        ("gan_weight", "sid", "f-distill, dmd2"),
        ("guidance", "mmd", "consistency, scm"),
        ("ratio_clip", "dmd2", "f-distill, uni-instruct"),
        ("backtrack", "moment-matching", "disback"),
    ):
        said = f"--{name.replace('_', '-')} does nothing with --method {other}"
        with pytest.raises(UserError, match=said) as caught:
            dm.distill("ring8", method=other, **{name: 0.5})
        assert readers in str(caught.value)
    with pytest.raises(UserError, match="did you mean gan_weight"):
        dm.distill("ring8", method="dmd2", gan_wait=0.5)


def test_settings_of_another_method_do_not_pass_for_a_methods_own() -> None:
    sid = METHODS["sid"].settings()
    with pytest.raises(UserError, match="no settings of dmd2"):
        DistillOptions(method="dmd2", settings=sid)
    with pytest.raises(UserError, match="no settings of dmd2"):
        dataclasses.replace(DistillOptions(method="sid", settings=sid), method="dmd2")
