"""The optional package diffusers: imported only when it is needed, and without a word on the network."""

from __future__ import annotations

import importlib
from typing import Any

from distmatch.base.errors import UserError


def import_diffusers() -> Any:
    """The package diffusers.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise UserError(
            "teachers of diffusers need the package diffusers, which is not installed",
            got=str(error),
            fix="pip install distmatch[diffusers]",
        ) from error
