"""Tensors on their way to a file: one at a time, so that saving never has a second copy of a model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trady.errors import FileError

#: Names of types in safetensors files, in the order in which their tensors lie there, the last first.
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_ORDER = {name: place for place, name in enumerate(_NAMES.values())}


@dataclass(frozen=True)
class Outline:
    """A tensor that is made when it is asked for.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        make: Makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Outline:
        """Return the outline of a tensor that is there."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made anew when it is asked for.

    Args:
        outlines: What is made.
    """

    def __init__(self, outlines: Mapping[str, Outline]) -> None:
        self.outlines = dict(outlines)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LazyTensors:
        """Return tensors of any mapping; those of a lazy one are not made."""
        if isinstance(tensors, cls):
            return tensors
        return cls({name: Outline.of(tensor) for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.outlines[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def joined(*parts: tuple[str, Mapping[str, Tensor]]) -> LazyTensors:
    """Return the tensors of several mappings, each under a prefix."""
    found: dict[str, Outline] = {}
    for prefix, tensors in parts:
        found.update({prefix + name: outline for name, outline in LazyTensors.of(tensors).outlines.items()})
    return LazyTensors(found)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, byte for byte as the library does, with one tensor in memory beside those that exist.

    Raises:
        OSError: It cannot be written.
        FileError: A tensor is of a type that such a file cannot hold.
    """
    outlines = LazyTensors.of(tensors).outlines
    ordered = sorted(outlines, key=lambda name: (-_ORDER[_name_of(name, outlines[name])], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        outline = outlines[name]
        start, end = end, end + torch.Size(outline.shape).numel() * outline.dtype.itemsize
        offsets = [start, end]
        header[name] = {"dtype": _NAMES[outline.dtype], "shape": list(outline.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in ordered:
            file.write(_content(outlines[name]))


def _name_of(name: str, outline: Outline) -> str:
    if outline.dtype not in _NAMES:
        raise FileError(f"{name!r} is {outline.dtype}, which a safetensors file cannot hold; convert it first")
    return _NAMES[outline.dtype]


def _content(outline: Outline) -> memoryview:
    made = outline.make().detach().cpu().contiguous()
    if tuple(made.shape) != outline.shape or made.dtype != outline.dtype:
        raise ValueError(f"a tensor of shape {outline.shape} came as {tuple(made.shape)} {made.dtype}")
    raw: Any = made.reshape(-1).view(torch.uint8).numpy() if made.numel() else b""
    return memoryview(raw).cast("B")
