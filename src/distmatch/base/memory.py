"""The error for data that do not fit into memory, for every form of the system's error."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from distmatch.base.errors import UserError

# Python, NumPy, torch on CPU and GPU, the linker and the system each have their own messages.
_WORDS = (
    *("out of memory", "not enough memory", "allocate memory", "unable to allocate", "bad_alloc"),
    *("storage size calculation overflowed", "can't start new thread", "failed to map segment"),
    *("alloc_failed", "std::bad_array_new_length"),
)


def out_of_memory(error: BaseException) -> UserError | None:
    """The message for an error that says that memory ran out; None for any other error.

    Args:
        error: What was raised.
    """
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(word in text.lower() for word in _WORDS)
    ):
        return None
    asked = re.search(r"allocate (\d+) bytes", text)
    if asked:
        got = f"{binary_size(int(asked[1]))} requested at once"
    else:
        got = text.split("\n")[0][:200] or "more than the available memory"
    if (free := free_memory()) is not None:
        got += f", {binary_size(free)} free"
    return UserError(
        "this does not fit into memory",
        got=got,
        fix="lower --batch or the size of the network, or use fewer samples",
    )


def free_memory() -> int | None:
    """Bytes that this process may still take, of the machine's memory and of its own limit; None: unknown."""
    free: int | None = None
    try:
        with open("/proc/meminfo", "rb") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass  # no Linux
    try:
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if most != resource.RLIM_INFINITY:
            left = max(most - used, 0)
            free = left if free is None else min(free, left)
    except (ImportError, OSError, ValueError):
        pass
    return free


def binary_size(count: int) -> str:
    """A number of bytes in the unit that suits it, such as ``1.5 GiB``."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"
