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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distmatch.base.errors import UserError, cause
from distmatch.interop.pickle_machine import Budget, Damaged, Function, Machine, Recorded, key

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
_STORAGES = {f"{m}.{name}": dtype for m in ("torch", "torch.cuda") for name, dtype in _DTYPES.items()}
_DTYPE_NAMES = {str(dtype): dtype for dtype in _DTYPES.values()}

# Packages whose classes may occur beside the tensors; they are recorded, never imported.
_RECORDED = ("torch.nn.", "torch_utils.", "training.", "dnnlib.", "numpy.", "torch.device")

# A network of EDM: its argument holds class name, source text (never run) and state.
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"

# EDM's networks are modules within modules, four deep.
_DEEPEST, _MOST_MODULES = 32, 100_000


class _Storage:
    """Bytes and what they mean; the file's word on the device they came from is dropped."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self.numel = dtype, numel
        self.flat = torch.empty(0, dtype=dtype)

    def fill(self, raw: bytes) -> None:
        if self.numel:
            self.flat = torch.frombuffer(bytearray(raw), dtype=self.dtype)


class _Reading:
    """One file: the meaning of its names, and its remaining budget.

    Args:
        budget: The latter.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._functions: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            "collections.OrderedDict": lambda args: self._ordered(*args),
            "dnnlib.util.EasyDict": lambda args: self._ordered(*args),
            **dict.fromkeys(("builtins.set", "__builtin__.set"), lambda args: set(self._keys(*args))),
            **dict.fromkeys(
                ("builtins.frozenset", "__builtin__.frozenset"), lambda args: frozenset(self._keys(*args))
            ),
            "_codecs.encode": lambda args: self._encoded(*args),
            "torch.Size": lambda args: tuple(self._sizes(*args)),
            "torch._utils._rebuild_tensor": lambda args: self._tensor(*args),
            "torch._utils._rebuild_tensor_v2": lambda args: self._tensor(*args),
            "torch._utils._rebuild_parameter": lambda args: args[0],
            "torch.storage._load_from_bytes": lambda args: self._storage_from_bytes(*args),
        }
        self._found: dict[str, Any] = {}

    def find(self, name: str) -> Any:
        """The meaning of a name."""
        if name in _STORAGES:
            return _STORAGES[name]
        if name in _DTYPE_NAMES:
            return _DTYPE_NAMES[name]
        if name in self._functions:
            return Function(self._functions[name])
        if name in _BARE or name.startswith(_RECORDED):
            return Function(lambda args: Recorded(name, args))
        raise UserError(
            f"the pickle asks for {name[:200]!r}, which is not part of a network",
            expected="tensors, containers and classes of networks only",
            fix="do not open this file with anything else either: it may run code when it is loaded",
        )

    def find_storage(self, name: str) -> Any:
        """The meaning of a name inside a tensor's own bytes: the kind of its numbers."""
        if name not in _STORAGES:
            self.find(name)  # what is no part of a network is refused with that message
            raise Damaged(f"{name[:200]} instead of a kind of storage")
        return _STORAGES[name]

    def _keys(self, items: Any = ()) -> list[Any]:
        """What a set is made of."""
        self.budget.spend(8 * len(items))
        return [key(item) for item in _plain(items)]

    def _ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        """A dictionary of pairs."""
        self.budget.spend(16 * len(items))
        if isinstance(items, dict):
            return OrderedDict(items)
        return OrderedDict((key(name), value) for name, value in map(_plain, _plain(items)))

    def _encoded(self, text: Any, _encoding: Any = "latin1") -> bytes:
        """Bytes as protocol 2 writes them."""
        if not isinstance(text, str):
            raise Damaged("bytes of something that is no text")
        self.budget.spend(len(text))
        return text.encode("latin1")

    def _sizes(self, values: Any = ()) -> list[int]:
        """Lengths or steps of a tensor."""
        values = _plain(values)
        if len(values) > 16 or not all(type(n) is int and 0 <= n < 2**62 for n in values):
            raise Damaged("sizes of a tensor that are no sizes")
        return list(values)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise Damaged("a tensor without its storage")
        size, stride, (offset,) = self._sizes(size), self._sizes(stride), self._sizes((offset,))
        if 0 in size and math.prod(n or 1 for n in size) < 2**62:
            return torch.empty(size, dtype=storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # A stride of 0 would let a few bytes ask for any amount of memory.
        if 0 in size or last >= storage.numel or math.prod(size) > storage.numel:
            raise Damaged("a tensor that reaches outside of its storage")
        self.budget.spend(math.prod(size) * storage.dtype.itemsize)
        return storage.flat.as_strided(size, stride, offset).clone()

    def _storage_from_bytes(self, raw: Any) -> _Storage:
        """The storage in what ``torch.save`` wrote in its old form: pickles, the keys, then the bytes."""
        if not isinstance(raw, bytes):
            raise Damaged("a storage that does not consist of bytes")
        self.budget.spend(len(raw))
        file = io.BytesIO(raw)
        storages: dict[str, _Storage] = {}

        def persistent(identity: Any) -> _Storage:
            kind, dtype, name, _, numel, view = identity
            if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
                raise Damaged("a storage of an unknown form")
            if not isinstance(name, str) or type(numel) is not int or numel < 0:
                raise Damaged("a storage of an unknown form")
            return storages.setdefault(name, _Storage(dtype, numel))

        machine = Machine(file, self.find_storage, self.budget, persistent)
        if machine.load() != _MAGIC or machine.load() != _PROTOCOL:
            raise Damaged("a tensor in another form than torch's storage bytes")
        system = machine.load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Damaged("tensors of a big-endian machine")
        storage = machine.load()
        for name in _plain(machine.load()):
            found = storages[key(name)]
            count = int.from_bytes(file.read(8), "little", signed=True)
            content = file.read(count * found.dtype.itemsize) if count == found.numel else b""
            if count != found.numel or len(content) != count * found.dtype.itemsize:
                raise Damaged("a tensor is cut off")
            found.fill(content)
        if not isinstance(storage, _Storage) or storage.flat.numel() != storage.numel:
            raise Damaged("bytes that are no storage")
        return storage


# Built-in classes that occur where a class is requested.
_BARE = frozenset(
    {"builtins.object", "__builtin__.object", "builtins.slice", "__builtin__.slice"}
    | {"copyreg._reconstructor", "copy_reg._reconstructor"}
)


def _plain(value: Any) -> Any:
    """A list, a tuple or a set, as it is."""
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise Damaged(f"a {type(value).__name__} instead of a list")
    return value


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """The content of a pickle: plain containers, numbers, strings, tensors on the CPU, and :class:`Recorded`.

    Time and memory stay in proportion to the file, whatever it says.

    Raises:
        UserError: The file is missing or damaged, or names something outside of the list above.
    """
    file = Path(path)
    try:
        with open(file, "rb") as handle:
            return read_stream(handle)
    except OSError as error:
        raise UserError(f"cannot open {file}", got=error.strerror, expected="a network pickle") from error
    except UserError as error:
        raise UserError(f"{file} was not opened: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # A damaged or hostile pickle can fail in any way; nothing of it has been run.
        raise UserError(
            f"{file} cannot be read as a network pickle",
            got=cause(error),
            expected="a complete .pkl of EDM or EDM2",
            fix="it may be truncated or of another kind: download it again",
        ) from error


def read_stream(file: BinaryIO) -> Any:
    """What :func:`read_pickle` gives, from an open file; errors are those of the machine."""
    budget = Budget(file.seek(0, io.SEEK_END))
    return Machine(file, _Reading(budget).find, budget).load()


def persistent(value: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Class name and state of a recorded network of EDM; None for anything else."""
    if not isinstance(value, Recorded) or value.name != _PERSISTENT:
        return None
    if not value.args or not isinstance(value.args[0], Mapping):
        return None
    meta = value.args[0]
    name, state = meta.get("class_name", ""), meta.get("state")
    return name if isinstance(name, str) else "", state if isinstance(state, Mapping) else {}


def state_of(module: Any) -> Mapping[str, Any]:
    """The attributes of a recorded module, whether EDM or plain torch pickled it."""
    found = persistent(module)
    if found is not None:
        return found[1]
    return module.state if isinstance(module, Recorded) and isinstance(module.state, Mapping) else {}


def named_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a recorded module under the names that its ``state_dict`` would give them.

    Raises:
        UserError: Modules that hold one another too deep or too often to be those of a network.
    """
    waiting, seen = [("", module, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_MODULES or len(prefix) > 1000:
            raise UserError("modules within modules without an end", expected="a network as EDM saves it")
        state = state_of(module)
        passing = _within(state, "_non_persistent_buffers_set", (set, frozenset))
        for kind in ("_parameters", "_buffers"):
            for name, value in _within(state, kind, dict).items():
                if isinstance(value, Tensor) and name not in passing:
                    yield f"{prefix}{name}", value
        children = [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in _within(state, "_modules", dict).items()
            if child is not None
        ]
        waiting.extend(reversed(children))


def _within(state: Mapping[str, Any], name: str, kinds: Any) -> Any:
    """An attribute of a module, or an empty container where it is absent or of another kind."""
    value = state.get(name)
    return value if isinstance(value, kinds) else {}
