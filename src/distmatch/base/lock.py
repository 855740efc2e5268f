"""The lock of a folder, so that one process at a time writes in it.

A lock of the operating system, not the mere presence of a file: it ends with the process, even killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path

from distmatch.base.errors import UserError

LOCK = ".lock"
"""Name of the lock file."""
MARK = "distmatch run folder"
"""What the lock file of a run folder begins with: it marks the folder as ours."""


def take_lock(folder: Path, mark: str = MARK) -> int:
    """Locks a folder.

    Args:
        folder: The folder.
        mark: What it is, which the lock file begins with.

    Returns:
        The open lock file; closing it gives the lock back.

    Raises:
        UserError: Another process holds it.
        OSError: The lock file cannot be written.
    """
    lock = folder / LOCK
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been replaced between opening the file and locking it: then we hold a dead lock.
        if not os.path.samestat(os.fstat(fd), os.stat(lock)):
            raise BlockingIOError(errno.EAGAIN, "replaced by another process")
    except BlockingIOError as error:
        used = _in_use(folder, fd)
        os.close(fd)
        raise used from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(fd)
            raise
        warnings.warn(f"{folder} is on a file system without locks: run one process in it only", stacklevel=5)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{mark}, process {os.getpid()}\n".encode(), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def contents(folder: Path) -> list[str]:
    """Names in a folder, sorted; none if there is no folder.

    Left out are the lock and what killed processes have left of single files, which is nothing to continue.
    """
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in names if name != LOCK and not (name[0] == "." and name.endswith(".tmp")))


def refuse_in_use(folder: Path) -> None:
    """Refuses a folder that another process holds, and leaves it as it is.

    Raises:
        UserError: It is held.
    """
    lock = folder / LOCK
    if not lock.is_file():
        return
    fd = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(folder, fd) from error
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(fd)


def _in_use(folder: Path, fd: int) -> UserError:
    holder = os.pread(fd, 100, 0).decode(errors="replace").strip()
    return UserError(
        f"another process is writing to {folder}",
        got=holder or "a locked folder",
        fix="wait until it ends, stop it, or choose another folder with --out",
    )
