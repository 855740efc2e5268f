"""How large data may be: checked from headers, before anything is read."""

from __future__ import annotations

from pathlib import Path

from distmatch.base.errors import UserError
from distmatch.base.inputs import memory_bound

MOST_PIXELS = 2**24
"""Pixels of one image, 4096 x 4096: larger ones are not what a generator is trained on."""
MOST_INFLATION = 200
"""How many times its size in the archive an array may have, beyond :data:`FREE_BYTES`."""
FREE_BYTES = 2**26
"""Arrays up to 64 MiB may be packed as densely as they are."""


def check_bytes(path: Path, size: int, packed: int | None = None) -> None:
    """Refuses what would need more memory than there is, or an archive that swells out of proportion.

    Args:
        path: The file.
        size: Bytes that its content takes in memory.
        packed: Bytes that it takes in the file, where it is compressed.

    Raises:
        UserError: It is too much.
    """
    most = memory_bound()
    if size > most:
        raise UserError(
            f"{path} does not fit into memory",
            got=f"{size / 2**30:,.1f} GiB",
            expected=f"at most {most / 2**30:,.1f} GiB, half of the memory that is free",
            fix="use a part of it, or save it as uint8",
        )
    if packed is not None and size > FREE_BYTES and size > MOST_INFLATION * packed:
        raise UserError(
            f"{path} contains an array that is {size // max(packed, 1)} times as large as in the file",
            got=f"{packed / 2**20:,.1f} MiB for {size / 2**20:,.0f} MiB",
            expected=f"at most {MOST_INFLATION} times beyond {FREE_BYTES // 2**20} MiB",
            fix="save it uncompressed, with np.savez, if this is intended",
        )
