"""Reading what others wrote: regular files only, of a bounded size, parsed without surprises.

A path that a user names may be a pipe that never ends, a device, or a small file that unfolds into gigabytes.
All of this is found before the content is read.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distmatch.base.errors import UserError
from distmatch.base.memory import free_memory

if TYPE_CHECKING:
    import numpy as np  # options are parsed without it, so that --help is fast

LARGEST_TEXT = 64 * 2**20
"""Bytes of the largest JSON file that is read."""
DEEPEST = 200
"""Levels of nesting in JSON; nothing that is written here has a tenth of it."""
_LONGEST_INTEGER = 40  # digits; more do not fit into any number that is used here
_LARGEST_TOML = 2**18
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# A dotted key of very many parts costs tomllib the square of their number.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){21}""")


def checked_path(path: str | os.PathLike[str]) -> Path:
    """A path that the operating system can take.

    Raises:
        UserError: It holds a NUL, or a character that has no form in a file's name.
    """
    try:
        if b"\0" not in os.fsencode(path):
            return Path(path)
        reason = "a NUL"
    except UnicodeEncodeError as error:
        reason = str(error)
    raise UserError("this is not a path", got=f"{str(path)[:80]!r} ({reason})", fix="write it without that")


def require_regular_file(path: str | os.PathLike[str], what: str = "a file") -> Path:
    """Accepts only regular files, and links to them; nothing is opened.

    Args:
        path: The path.
        what: What the file should be, for the message.

    Raises:
        UserError: There is nothing, or it is a folder, a pipe, a device or a socket.
    """
    file = checked_path(path)
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{file} is missing", expected=what, fix="check the path") from error
    except OSError as error:
        raise UserError(f"cannot open {file}", got=error.strerror, expected=what) from error
    if stat.S_ISREG(mode):
        return file
    kind = "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")
    raise UserError(f"{file} is not a regular file", got=kind, expected=what, fix="name a file on a disk")


def read_limited(path: str | os.PathLike[str], limit: int = LARGEST_TEXT, what: str = "a file") -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: It is no regular file, cannot be read, or is larger.
    """
    file = require_regular_file(path, what)
    try:
        with open(file, "rb") as handle:
            content = handle.read(limit + 1) if os.fstat(handle.fileno()).st_size <= limit else None
    except OSError as error:
        raise UserError(f"cannot read {file}", got=error.strerror, expected=what) from error
    if content is None or len(content) > limit:
        raise UserError(f"{file} is too large", expected=f"{what} of at most {limit} bytes")
    return content


def parse_json(text: str | bytes, source: object = "the text") -> Any:
    """JSON as Python values. An integer of more than 40 digits becomes a float, infinite past 1.8e308.

    Raises:
        UserError: It is no JSON, or it is nested deeper than :data:`DEEPEST`.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:
        raise UserError(
            f"cannot read {source} as JSON", got=str(error)[:200], fix="restore it from a copy"
        ) from error
    if _depth(value) > DEEPEST:
        raise _too_deep(source)
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _too_deep(source: object) -> UserError:
    return UserError(f"{source} is nested too deeply", expected=f"at most {DEEPEST} levels")


def _depth(value: Any) -> int:
    """Levels of nesting, found without recursion."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level, depth = below, depth + 1
    return depth


def parse_toml(text: str, source: object = "the text") -> dict[str, Any]:
    """TOML as Python values.

    Raises:
        UserError: It is no TOML; the message shows the line. Or it is larger, nested deeper or has longer
            keys or numbers than any configuration.
    """
    long = _LONG_KEY.search(text) if len(text) <= _LARGEST_TOML else None
    if long or len(text) > _LARGEST_TOML:
        got = f"a name that begins {long[0][:40]!r}" if long else f"{len(text)} characters"
        raise UserError(f"{source} is not a configuration", got=got, expected="short names and values")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        got = str(error)
        if found := re.search(r"at line (\d+)", got):
            line = text.split("\n")[int(found[1]) - 1]
            got += f": {line.strip()[:200]!r}"
        raise UserError(
            f"{source} is not valid TOML", got=got, expected='lines like name = "value", name = 3, [section]'
        ) from error
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{source} is not valid TOML", got=str(error)[:200]) from error
    if _depth(values) > DEEPEST:
        raise _too_deep(source)
    return values


@dataclass(frozen=True)
class ArrayHeader:
    """What the header of a stored array says.

    Attributes:
        shape: Its shape.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_array_header(handle: IO[bytes]) -> ArrayHeader:
    """The header of an array in NumPy's format, from the position of the handle.

    Raises:
        ValueError: It is none, or describes no array.
    """
    import numpy as np

    if handle.read(6) != b"\x93NUMPY":
        raise ValueError("it has no NumPy header")
    version = handle.read(2)
    width = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(version)
    if width is None:
        raise ValueError(f"an unknown version of the format, {version!r}")
    length = int.from_bytes(handle.read(width), "little")
    if not 0 < length <= 10_000:  # NumPy's own bound
        raise ValueError(f"a header of {length} bytes")
    try:
        said = ast.literal_eval(handle.read(length).decode("utf-8" if version[0] == 3 else "latin1"))
        shape, dtype = said["shape"], np.dtype(said["descr"] if isinstance(said["descr"], str) else None)
    except (SyntaxError, TypeError, KeyError, RecursionError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"a header that describes no array of numbers ({type(error).__name__})") from error
    if not isinstance(said["descr"], str):
        raise ValueError("an array of records, not of numbers")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise ValueError(f"a shape of {str(shape)[:80]}")
    return ArrayHeader(shape, dtype)


def memory_bound() -> int:
    """Bytes that an input may take in memory: half of the free memory, or 4 GiB where that is not known."""
    free = free_memory()
    return 2**32 if free is None else free // 2
