"""What is checked before a file is read: that it is a regular file, and that its content fits into memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from distmatch.base.errors import UserError

MOST_PIXELS = 2**24
"""Pixels of one image, 4096 x 4096: larger ones are not what a generator is trained on."""
MOST_INFLATION = 200
"""How many times its size in the archive an array may have, beyond :data:`FREE_BYTES`."""
FREE_BYTES = 2**26
"""Arrays up to 64 MiB may be packed as densely as they are."""


def check_regular(path: Path) -> None:
    """Refuses pipes, devices and sockets, by which reading would hang or never end; links are followed.

    Raises:
        UserError: The path is no regular file, or cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"cannot look at {path}", got=str(error), fix="check the path") from error
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{path} is not a regular file",
            got="a pipe, a device or a socket" if not stat.S_ISDIR(mode) else "a folder",
            expected="a file",
            fix="write the data to a file first",
        )


def memory_bytes() -> int:
    """Half of the memory of this machine: the most that one data set may take."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**33


def check_bytes(path: Path, size: int, packed: int | None = None) -> None:
    """Refuses what would need more memory than there is, or an archive that swells out of proportion.

    Args:
        path: The file.
        size: Bytes that its content takes in memory.
        packed: Bytes that it takes in the file, where it is compressed.

    Raises:
        UserError: It is too much.
    """
    most = memory_bytes()
    if size > most:
        raise UserError(
            f"{path} does not fit into memory",
            got=f"{size / 2**30:,.1f} GiB",
            expected=f"at most {most / 2**30:,.1f} GiB, half of this machine's memory",
            fix="take a part of it, or save it as uint8",
        )
    if packed is not None and size > FREE_BYTES and size > MOST_INFLATION * packed:
        raise UserError(
            f"{path} holds an array that is {size // max(packed, 1)} times as large as in the file",
            got=f"{packed / 2**20:,.1f} MiB for {size / 2**20:,.0f} MiB",
            expected=f"at most {MOST_INFLATION} times beyond {FREE_BYTES // 2**20} MiB",
            fix="save it uncompressed, with np.savez, where it is meant",
        )
