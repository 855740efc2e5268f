"""Reading the tensors of a pickle without running anything that it names.

A pickle is a small program that may call any function it can name. Here every name is looked up in a fixed
list: containers, tensors and storages are rebuilt by functions of this file, classes of networks become
:class:`Recorded`, which only remembers what it was given, and any other name ends the reading. Nothing of the
file's choosing is imported, called or constructed.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError

# How torch before 1.6, and a tensor inside a plain pickle to this day, begins: a number, then a version.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}

# Packages whose classes may occur beside the tensors; they are recorded, never imported.
_RECORDED = ("torch.nn.", "torch_utils.", "training.", "dnnlib.", "numpy.", "torch.device")


class Recorded:
    """What a pickle says about an object that is not built.

    Attributes:
        name: Module and name of the class or function.
        args: The arguments it would have been called with.
        state: The state it would have been given, or None.
        items: Entries it would have been filled with.
    """

    name: str = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Recorded:
        """Keeps the arguments."""
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        """Everything happens in ``__new__``, which is all that some opcodes of a pickle call."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keeps an entry."""
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Keeps entries."""
        self.items.extend(values)


class _Storage:
    """Bytes and what they mean; the file's word on the device they came from is dropped."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self.numel = dtype, numel
        self.flat = torch.empty(0, dtype=dtype)

    def fill(self, raw: bytes) -> None:
        if self.numel:
            self.flat = torch.frombuffer(bytearray(raw), dtype=self.dtype)


class _Plain(dict):
    """A dictionary whose class had attributes on top; they are left out."""

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept: the entries are what counts."""


class _Inert(pickle.Unpickler):
    """An unpickler that can only reach the functions of this file."""

    def __init__(self, file: io.BufferedIOBase, storages: dict[str, _Storage] | None = None) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _REBUILDERS:
            return _REBUILDERS[full]
        if module in ("torch", "torch.cuda") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name in _DTYPE_NAMES:
            return _DTYPE_NAMES[name]
        if full.startswith(_RECORDED):
            return type(name, (Recorded,), {"name": full})
        raise UserError(
            f"the pickle asks for {full}, which is no part of a network",
            expected="tensors, containers and classes of networks only",
            fix="do not open this file with anything else either: it may run code when it is loaded",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage that torch keeps beside its pickle; only inside a tensor's own bytes."""
        if self._storages is None:
            raise pickle.UnpicklingError("a reference to something outside of the file")
        kind, dtype, key, _, numel, view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
            raise pickle.UnpicklingError("a storage of an unknown form")
        return self._storages.setdefault(str(key), _Storage(dtype, int(numel)))


def _storage_from_bytes(raw: bytes) -> _Storage:
    """The storage in what ``torch.save`` wrote in its old form: four pickles, the keys, then the bytes."""
    file = io.BytesIO(raw)
    storages: dict[str, _Storage] = {}

    def part() -> Any:
        return _Inert(file, storages).load()

    if part() != _MAGIC or part() != _PROTOCOL:
        raise pickle.UnpicklingError("a tensor in another form than torch's storage bytes")
    if not dict(part()).get("little_endian", False):
        raise pickle.UnpicklingError("tensors of a big-endian machine")
    storage = part()
    for key in part():
        found = storages[str(key)]
        count = int.from_bytes(file.read(8), "little", signed=True)
        raw_size = count * found.dtype.itemsize
        content = file.read(raw_size) if count == found.numel else b""
        if count != found.numel or len(content) != raw_size:
            raise pickle.UnpicklingError("a tensor is cut off")
        found.fill(content)
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("bytes that are no storage")
    return storage


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without its storage")
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if math.prod(size) == 0:
        return torch.empty(size, dtype=storage.dtype)
    last = int(offset) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A stride of 0 would let a few bytes ask for any amount of memory.
    if min((offset, *stride)) < 0 or last >= storage.numel or math.prod(size) > storage.numel:
        raise pickle.UnpicklingError("a tensor that reaches outside of its storage")
    return storage.flat.as_strided(size, stride, int(offset)).clone()


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _encoded(text: str, _encoding: str = "latin1") -> bytes:
    """Bytes as protocol 2 writes them."""
    return text.encode("latin1")


class _Call:
    """A function of this file as a pickle sees it: it can be called, and no attribute of it can be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function with a state")


class _Rebuilt(Recorded):
    """An object that was to be made by ``copyreg``; its class is its first argument."""

    name = "copyreg._reconstructor"


class _Persistent(Recorded):
    """A network of EDM: its argument holds class name, source text (never run) and state."""

    name = "torch_utils.persistence._reconstruct_persistent_obj"


_REBUILDERS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.slice": slice,
    "__builtin__.set": set,
    "builtins.object": Recorded,
    "__builtin__.object": Recorded,
    "_codecs.encode": _Call(_encoded),
    "copyreg._reconstructor": _Rebuilt,
    "copy_reg._reconstructor": _Rebuilt,
    "dnnlib.util.EasyDict": _Plain,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_parameter": _Call(_parameter),
    "torch.storage._load_from_bytes": _Call(_storage_from_bytes),
    "torch_utils.persistence._reconstruct_persistent_obj": _Persistent,
}


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """The content of a pickle: plain containers, numbers, strings, tensors on the CPU, and :class:`Recorded`.

    Raises:
        UserError: The file is missing or damaged, or names something outside of the list above.
    """
    file = Path(path)
    try:
        with open(file, "rb") as handle:
            return _Inert(handle).load()
    except OSError as error:
        raise UserError(f"cannot open {file}", got=error.strerror, expected="a network pickle") from error
    except UserError as error:
        raise UserError(f"{file} was not opened: {error}") from error
    except Exception as error:
        # A damaged or hostile pickle can fail in any way; nothing of it has been run.
        raise UserError(
            f"{file} cannot be read as a network pickle",
            got=f"{type(error).__name__}: {error}",
            expected="a whole .pkl of EDM or EDM2",
            fix="it may be cut off or of another kind: download it again",
        ) from error


def persistent(value: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Class name and state of a recorded network of EDM; None for anything else."""
    if not isinstance(value, _Persistent) or not value.args or not isinstance(value.args[0], Mapping):
        return None
    meta = value.args[0]
    state = meta.get("state")
    return str(meta.get("class_name", "")), state if isinstance(state, Mapping) else {}


def state_of(module: Any) -> Mapping[str, Any]:
    """The attributes of a recorded module, whether EDM or plain torch pickled it."""
    found = persistent(module)
    if found is not None:
        return found[1]
    return module.state if isinstance(module, Recorded) and isinstance(module.state, Mapping) else {}


def named_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a recorded module under the names that its ``state_dict`` would give them."""
    state = state_of(module)
    passing = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in dict(state.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in passing:
                yield prefix + str(name), value
    for name, child in dict(state.get("_modules") or {}).items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.")
