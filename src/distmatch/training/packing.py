"""A tree of tensors and numbers as named tensors and a description that JSON can hold, and back."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# What safetensors stores under its own name; tensors of other types are stored as their bytes.
_NATIVE = {
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


@dataclass
class _Packer:
    """What :func:`pack` has found so far.

    A function inside of it that calls itself would be a reference cycle, in which the copies of all tensors
    stay in memory until the next garbage collection.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """Those that were stored already, by place in memory."""
    storages: set[int] = field(default_factory=set)

    def add(self, t: Tensor, path: str) -> dict[str, Any]:
        if isinstance(t, DTensor):
            # Never one for two: the shares of a process may be empty, and then are all in the same place.
            self.tensors[path] = t.detach()
            return {"tensor": path}
        if t.layout != torch.strided or t.is_quantized or t.is_meta:
            raise TypeError(f"{path or 'the tree'} is a tensor that is sparse, quantized or without data")
        place = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())
        if t.numel() and place in self.nodes:
            return self.nodes[place]
        flat = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if flat.untyped_storage().data_ptr() in self.storages:
            flat = flat.clone()
        if flat.numel():
            self.storages.add(flat.untyped_storage().data_ptr())
        name = path.encode("ascii", "backslashreplace").decode() or "tensor"
        while name in self.tensors or name == "__metadata__":
            name += "'"
        node: dict[str, Any] = {"tensor": name}
        if flat.dtype not in _NATIVE:
            node |= {"dtype": str(flat.dtype).removeprefix("torch."), "shape": list(flat.shape)}
            flat = flat.reshape(-1).view(torch.uint8)
        self.tensors[name] = flat
        self.nodes[place] = node
        return node

    def walk(self, node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            return self.add(node, path)
        if node is None or type(node) in (bool, int, str):
            return node
        if type(node) is float:
            # Python writes a finite float as the shortest text that reads back to the same bits.
            return node if math.isfinite(node) else {"float": struct.pack(">d", node).hex()}
        if isinstance(node, dict):
            for key in node:
                if type(key) not in (int, str):
                    raise TypeError(f"the key {key!r} in {path or 'the tree'} is neither str nor int")
            return {
                "dict": [[key, self.walk(value, f"{path}/{key}".lstrip("/"))] for key, value in node.items()]
            }
        if type(node) in (list, tuple):
            items = [self.walk(value, f"{path}/{i}".lstrip("/")) for i, value in enumerate(node)]
            return {"list" if type(node) is list else "tuple": items}
        raise TypeError(
            f"{path or 'the tree'} is a {type(node).__module__}.{type(node).__qualname__}; "
            "a checkpoint contains dict, list, tuple, Tensor, int, float, bool, None and str"
        )


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Splits a tree into its tensors and a description that JSON can hold.

    The tensors returned share no memory with each other, as safetensors demands, but may share it with the
    tree. A tensor that occurs twice is stored once. Devices and ``requires_grad`` are not kept.

    Args:
        tree: Nested dict (keys str or int), list, tuple, Tensor, int, float, bool, None and str.

    Returns:
        The tensors by name (their path in the tree) and the structure for :func:`unpack`.

    Raises:
        TypeError: Something else is in the tree; the message says where.
    """
    packer = _Packer()
    structure = packer.walk(tree, "")
    return packer.tensors, structure


def unpack(tensors: dict[str, Tensor], structure: Any) -> Any:
    """Rebuilds the tree that :func:`pack` split; tensors that were one object are one object again.

    Raises:
        ValueError: The structure is not one that :func:`pack` makes.
        KeyError: A tensor is missing.
    """
    return _restored(structure, tensors, {})


def _restored(node: Any, tensors: dict[str, Tensor], seen: dict[str, Tensor]) -> Any:
    """A part of the tree; ``seen`` holds the tensors that are restored."""
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        name = node["tensor"]
        if name not in seen:
            seen[name] = _as_before(tensors[name], node)
        return seen[name]
    match list(node.items()):
        case [("dict", items)]:
            return {key: _restored(value, tensors, seen) for key, value in items}
        case [("list", items)]:
            return [_restored(value, tensors, seen) for value in items]
        case [("tuple", items)]:
            return tuple(_restored(value, tensors, seen) for value in items)
        case [("float", bits)]:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
    raise ValueError(f"not part of a checkpoint: {str(node)[:80]}")


def _as_before(tensor: Tensor, node: dict[str, Any]) -> Tensor:
    if "dtype" not in node:
        return tensor
    dtype = getattr(torch, node["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a type of tensors: {node['dtype']!r:.80}")
    # Cloned, because a view as a wider type needs aligned memory.
    return tensor.clone().view(dtype).reshape(node["shape"])
