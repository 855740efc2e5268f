"""Files that are whole or absent: temporary name, fsync, rename. Nothing here ever unpickles."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _serialize

from distmatch.base.errors import UserError
from distmatch.base.inputs import checked_path, parse_json, read_limited, require_regular_file
from distmatch.base.memory import out_of_memory

WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that the weights of a network may have."""
_PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def _os_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}",
        got=error.strerror or str(error),
        expected="a folder with free space and write permission",
        fix="choose another folder with --out, or free some disk space",
    )


def _fsync(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def cache_folder() -> Path:
    """``$DISTMATCH_CACHE``, else ``$XDG_CACHE_HOME/distmatch``, else ``~/.cache/distmatch``."""
    own = os.environ.get("DISTMATCH_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "distmatch"


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes ``content`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    target = checked_path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        raise _os_error(target, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def atomic_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder to fill; on success it takes the name ``path``, replacing what was there.

    Raises:
        UserError: The place cannot be written.
    """
    target = checked_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise _os_error(target, error) from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        os.chmod(temporary, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        raise _os_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_model_folder(folder: Path, known: Iterable[str]) -> None:
    """Accepts a new folder for a model, or the folder of an earlier one.

    Args:
        folder: Where it is to go.
        known: The names that a saved model consists of.

    Raises:
        UserError: The folder holds something else.
    """
    found = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    # A README alone belongs to the user.
    if folder.exists() and not (folder.is_dir() and found <= set(known) and found != {"README.md"}):
        raise UserError(
            f"{folder} already exists and is not a model folder",
            expected="a new folder, or one that holds only a saved model",
            fix="choose another folder",
        )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: The file is missing, is no regular file, or is not JSON of a sane size and depth.
    """
    return parse_json(read_limited(path, what="a JSON file"), path)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors, atomically."""
    flat: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        # The format stores every tensor separately: tied weights are written once per name.
        flat[name] = kept.clone() if kept.untyped_storage().data_ptr() in seen else kept
        seen.add(kept.untyped_storage().data_ptr())
    data = _serialize(flat, dict(metadata) if metadata else None)
    atomic_write(path, data if not metadata or len(metadata) < 2 else _ordered(data))


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the package writes them in another one each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return b"".join((data[:8], text, memoryview(data)[8 + size :])) if len(text) == size else data


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file on the CPU.

    The tensors are in memory of their own, not views of the mapped file. Views begin at any byte, and kernels
    choose their way by alignment, so the same weights would give other last bits; and a mapped file that
    another process cuts short ends this one.

    Raises:
        UserError: The file is missing, truncated, or is a pickle (which is refused, never loaded).
    """
    file = require_regular_file(path, "a safetensors file")
    try:
        with open(file, "rb") as handle:
            head = handle.read(9)
    except OSError as error:
        raise UserError(f"cannot open {file}", got=error.strerror, expected="a safetensors file") from error
    # A safetensors file begins with the length of its header, which can look like a pickle's first bytes,
    # followed by the header's opening brace, which a pickle does not have there.
    if head[8:] != b"{" and any(head.startswith(magic) for magic in _PICKLE_HEADS):
        raise UserError(
            f"{file} is a pickle or a torch zip archive and was not opened",
            expected="safetensors: a pickle can run any code when it is loaded",
            fix="convert it in an environment where you trust it, with safetensors.torch.save_file",
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if memory := out_of_memory(error):
            raise memory from error
        raise UserError(
            f"cannot read {file} as safetensors",
            got=str(error),
            expected="a complete safetensors file",
            fix="it may be truncated: copy it again, or use an earlier checkpoint",
        ) from error


def load_into(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copies ``tensors`` into ``module``, all or nothing.

    A module on the meta device is given its memory, on the CPU, once all shapes are known to be right.

    Raises:
        UserError: A tensor is missing, left over, or of another shape (another architecture); or weights are
            of a type that no network computes with.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    extra = sorted(tensors.keys() - own.keys())
    wrong = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or extra or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors missing (first: {missing[0][:200]})")
        if extra:
            parts.append(f"{len(extra)} tensors too many (first: {extra[0][:200]})")
        if wrong:
            k = sorted(wrong)[0]
            parts.append(f"{k} has shape {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}")
        raise UserError(
            f"{source} belongs to another architecture",
            got="; ".join(parts),
            expected=f"the {len(own)} tensors of this model",
            fix="use the config that was saved with it",
        )
    odd = [k for k in own if own[k].is_floating_point() and tensors[k].dtype not in WEIGHTS]
    if odd:
        raise UserError(
            f"{source} has weights of a dtype that is not supported",
            got=f"{odd[0]} of type {str(tensors[odd[0]].dtype).removeprefix('torch.')}",
            expected=", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHTS),
            fix="undo the quantization and save the weights as float32",
        )
    module._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    module.load_state_dict(dict(tensors))


def guard(action: Callable[[], Any], path: str | os.PathLike[str]) -> Any:
    """Runs a writing ``action`` and turns an operating-system error into a :class:`UserError`."""
    try:
        return action()
    except OSError as error:
        raise _os_error(Path(path), error) from error
