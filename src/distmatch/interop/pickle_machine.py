"""An interpreter for the opcodes of pickles: containers, names from a list, and nothing else.

Python's own unpickler calls what a pickle names, hashes what it calls a key, and takes its word for how
large a memo must be. This one has one short function for each opcode that a pickle of networks uses. What it
builds grows with the file, never faster.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

Damaged = pickle.UnpicklingError

_MOST_OPCODES = 1_000_000
_LONGEST_INTEGER = 2**128
_KEYS = (str, bytes, bool, type(None))


class Budget:
    """The remaining budget of a file, in opcodes and in bytes beyond those of its own objects.

    Args:
        size: Bytes of the file. Everything that is rebuilt, copied or decoded lies in it somewhere, so it may
            come to twice that, and a little.
    """

    def __init__(self, size: int) -> None:
        self.opcodes, self.bytes = _MOST_OPCODES, 2 * size + 2**20

    def spend(self, count: int) -> None:
        """Takes bytes off.

        Raises:
            UnpicklingError: There are none left.
        """
        self.bytes -= count
        if count < 0 or self.bytes < 0:
            raise Damaged("a file that unpacks to more than its contents")


class Function:
    """Something that a pickle may call: it has no attributes to set and no methods to find.

    Args:
        apply: What is done with the tuple of arguments.
    """

    __slots__ = ("apply",)

    def __init__(self, apply: Callable[[tuple[Any, ...]], Any]) -> None:
        self.apply = apply


class Recorded:
    """What a pickle says about an object that is not built.

    Attributes:
        name: Module and name of the class or function.
        args: The arguments it would have been called with.
        state: The state it would have been given, or None.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None


def key(value: Any) -> Any:
    """A value that may be the key of a dictionary or the element of a set.

    Raises:
        UnpicklingError: It may not: a tuple of tuples of tuples takes for ever to hash.
    """
    if type(value) in _KEYS or (type(value) is int and abs(value) < 2**31):
        return value
    raise Damaged(f"a {type(value).__name__} as a key")


class Machine:
    """Reads one pickle, or several that follow one another.

    Args:
        file: Where the bytes are.
        find: The meaning of a name; it raises for one that is not on its list.
        budget: The budget.
        persistent: The meaning of a persistent id.
    """

    def __init__(
        self,
        file: BinaryIO,
        find: Callable[[str], Any],
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self._file, self._find, self._budget, self._persistent = file, find, budget, persistent
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def load(self) -> Any:
        """The next pickle.

        Raises:
            UnpicklingError: It is damaged, or does what no pickle of a network does.
            ValueError: It is damaged.
        """
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        code, next_byte, budget = b"", self._file.read, self._budget
        while code != pickle.STOP:
            code = next_byte(1)
            if code not in _STEPS:
                raise Damaged(f"the opcode {code!r}" if code else "a file that is cut off")
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise Damaged(f"a file of more than {_MOST_OPCODES} opcodes")
            step, argument = _STEPS[code]
            step(self, argument(self) if argument else None)  # type: ignore[arg-type]
        return self._stack.pop()

    # What pickletools reads arguments from: lengths in the file may be any number.

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes."""
        return self._file.read(max(0, min(count, self._size - self._file.tell())))

    def readline(self) -> bytes:
        """The rest of a line."""
        return self._file.readline()

    # One function for each kind of opcode.

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and abs(value) >= _LONGEST_INTEGER:
            raise Damaged("an integer of more than 128 bits")
        self._stack.append(value)

    def _nothing(self, _: Any) -> None:
        pass

    def _protocol(self, version: int) -> None:
        if version > 5:
            raise Damaged(f"protocol {version}")

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _items(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._items()

    def _put(self, index: Any) -> None:
        place = len(self._memo) if index is None else int(index)
        if place > _MOST_OPCODES:
            raise Damaged("a memo with more places than a file can fill")
        self._memo[place] = self._stack[-1]

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    def _tuple(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Recorded):  # entries of a recorded object are of no use
            raise Damaged(f"entries for a {type(target).__name__}")

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, set):
            raise Damaged(f"elements for a {type(target).__name__}")
        target.update(map(key, items))

    def _set_item(self, _: Any) -> None:
        value, name = self._stack.pop(), self._stack.pop()
        self._set_items([name, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, Recorded):
            raise Damaged(f"keys for a {type(target).__name__}")

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Recorded):
            target.state = state
        elif not isinstance(target, dict):  # attributes of a dictionary are left out: its entries count
            raise Damaged(f"a {type(target).__name__} with a state")

    def _name(self, name: str) -> None:
        self._stack.append(self._find(name.replace(" ", ".", 1)))

    def _stack_name(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Damaged("a name that is no text")
        self._stack.append(self._find(f"{module}.{name}"))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise Damaged(f"a call of a {type(function).__name__}")
        self._stack.append(function.apply(arguments))

    def _reduce(self, _: Any) -> None:
        arguments = self._stack.pop()
        self._call(self._stack.pop(), arguments)

    def _new_with_names(self, _: Any) -> None:
        names = self._stack.pop()
        if not isinstance(names, dict) or names:
            raise Damaged("arguments by name")
        self._reduce(None)

    def _instance(self, name: str) -> None:
        arguments = tuple(self._items())
        self._call(self._find(name.replace(" ", ".", 1)), arguments)

    def _object(self, _: Any) -> None:
        function, *arguments = self._items()
        self._call(function, tuple(arguments))

    def _outside(self, identity: Any) -> None:
        if self._persistent is None:
            raise Damaged("a reference to something outside of the file")
        self._stack.append(self._persistent(identity))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dictionary of keys and values that take turns."""
    return dict(zip(map(key, items[::2]), items[1::2], strict=True))


_VALUES = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"
)
_NAMED: Mapping[str, Callable[[Machine, Any], None]] = {
    **{name: Machine._push for name in _VALUES.split()},
    "NONE": lambda m, _: m._stack.append(None),
    "NEWTRUE": lambda m, _: m._stack.append(True),
    "NEWFALSE": lambda m, _: m._stack.append(False),
    "PROTO": Machine._protocol,
    "FRAME": Machine._nothing,
    "STOP": Machine._nothing,
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": lambda m, _: m._items().clear(),
    "DUP": lambda m, _: m._stack.append(m._stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._get),
    "EMPTY_TUPLE": lambda m, _: m._stack.append(()),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "TUPLE": lambda m, _: m._push(tuple(m._items())),
    "EMPTY_LIST": lambda m, _: m._stack.append([]),
    "LIST": lambda m, _: m._push(m._items()),
    "APPEND": Machine._append,
    "APPENDS": lambda m, _: m._extend(m._items()),
    "EMPTY_DICT": lambda m, _: m._stack.append({}),
    "DICT": lambda m, _: m._push(_pairs(m._items())),
    "SETITEM": Machine._set_item,
    "SETITEMS": lambda m, _: m._set_items(m._items()),
    "EMPTY_SET": lambda m, _: m._stack.append(set()),
    "ADDITEMS": lambda m, _: m._add(m._items()),
    "FROZENSET": lambda m, _: m._push(frozenset(map(key, m._items()))),
    "GLOBAL": Machine._name,
    "STACK_GLOBAL": Machine._stack_name,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "NEWOBJ_EX": Machine._new_with_names,
    "INST": Machine._instance,
    "OBJ": Machine._object,
    "BUILD": Machine._build,
    "PERSID": Machine._outside,
    "BINPERSID": lambda m, _: m._outside(m._stack.pop()),
}
# By the byte in the file: what to do, and how pickletools reads the argument.
_STEPS = {
    opcode.code.encode("latin1"): (_NAMED[opcode.name], opcode.arg.reader if opcode.arg else None)
    for opcode in pickletools.opcodes
    if opcode.name in _NAMED
}
