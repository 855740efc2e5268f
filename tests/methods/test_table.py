"""The table of methods: what it says of each is true, and the page shows it as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from distmatch.base.errors import UserError
from distmatch.methods.method import Method
from distmatch.methods.table import METHODS, check_settings
from distmatch.training.options import GROUPS, DistillOptions

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
    fields = {f.name for group in GROUPS for f in dataclasses.fields(getattr(options, group))}
    assert set(method.defaults) <= fields
    assert set(method.uses) <= fields
    for name, value in method.defaults.items():
        assert any(getattr(getattr(options, group), name, None) == value for group in GROUPS)
    check_settings(method, options.distill, **options.settings())


def test_names_of_settings_are_unique() -> None:
    options = DistillOptions()
    names = [f.name for group in (*GROUPS, "run", "net") for f in dataclasses.fields(getattr(options, group))]
    assert len(names) == len(set(names))


def test_a_setting_that_does_nothing_is_refused() -> None:
    options = DistillOptions.of("dmd2")
    wrong = {**options.settings(), "matching": dataclasses.replace(options.matching, sid_alpha=0.5)}
    with pytest.raises(UserError, match="--sid-alpha does nothing with --method dmd2"):
        check_settings(METHODS["dmd2"], options.distill, **wrong)
    options = DistillOptions.of("sid")
    changed = dataclasses.replace(options.distill, gan_weight=0.5)
    with pytest.raises(UserError, match="--gan-weight does nothing with --method sid"):
        check_settings(METHODS["sid"], changed, **options.settings())
