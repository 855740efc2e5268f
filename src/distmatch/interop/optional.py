"""Optional packages: imported only when they are needed, and without a word on the network."""

from __future__ import annotations

import importlib
from typing import Any

from distmatch.base.errors import UserError


def import_diffusers() -> Any:
    """The package diffusers.

    Raises:
        UserError: It is not installed.
    """
    return _package("diffusers", "teachers of diffusers need the package diffusers", "diffusers")


def import_onnxruntime() -> Any:
    """The package onnxruntime, once it is known that torch finds what it exports with.

    Raises:
        UserError: One of onnx, onnxscript and onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript"):
        _package(name, f"export to ONNX needs the package {name}", "onnx")
    return _package("onnxruntime", "an exported model is checked with the package onnxruntime", "onnx")


def _package(name: str, what: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{what}, which is not installed",
            got=str(error),
            fix=f"pip install distmatch[{extra}]",
        ) from error
