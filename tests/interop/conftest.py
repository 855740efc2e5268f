"""Teachers made of tiny pipelines, for all files of this folder."""

from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="session")
def teacher_of(tmp_path_factory):
    """One teacher of each family of pipelines; tests do not change what they compute."""
    from distmatch.interop.pipelines import load_pipeline
    from tests.helpers.pipelines import SIZE, save

    folder = tmp_path_factory.mktemp("pipelines")

    @cache
    def made(name: str) -> Any:
        return load_pipeline(save(name, folder), **SIZE[name])

    return made
