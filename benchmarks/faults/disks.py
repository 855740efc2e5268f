"""Small file systems, and damage to files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_system(mount: Path) -> Iterator[Path | None]:
    """A file system of 16 MiB in memory; None where it cannot be mounted."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "distmatch-faults", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def damage_file(file: Path, damage: str, where: float) -> None:
    """Damages a file at a place from 0, its beginning, to 1."""
    content = bytearray(file.read_bytes())
    at = int(where * (len(content) - 1))
    match damage:
        case "cut":
            del content[at:]
        case "emptied":
            content.clear()
        case "removed":
            file.unlink()
            return
        case "flipped":
            content[at] ^= 1 << int(8 * where)
        case _:
            content[at:] = bytes(len(content) - at)
    file.write_bytes(content)
