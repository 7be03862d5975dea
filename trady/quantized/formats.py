"""Storage formats of quantised weights: what each library adds, and the registry of them.

A format is one file beside this one and one registration in the package's ``__init__``. Classes of a library are told
apart by what they have; no library is imported before a weight of it is dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trady.ops.quantized import is_quantized


class Stored(Protocol):
    """A quantised weight [out, in] as its library keeps it."""

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is dequantised to."""
        ...

    @property
    def copies(self) -> int:
        """Tensors that the library makes of a weight while it dequantises, and of a result while it multiplies."""
        ...

    def dense(self) -> Tensor:
        """Dequantise, into memory of its own."""
        ...

    def tensors(self) -> Iterable[Tensor]:
        """What it takes in memory, scales included."""
        ...


def _nothing(model: nn.Module) -> None:
    """Leave a model as it is."""


@dataclass(frozen=True)
class StorageFormat:
    """How a library stores quantised weights.

    Attributes:
        read: Takes a linear layer and its weight; returns the weight as stored, ``None`` if it is of another format.
        keep_trainable: Turns off what would keep gradients from passing through such layers of a model.
    """

    read: Callable[[nn.Module, Any], Stored | None]
    keep_trainable: Callable[[nn.Module], None] = _nothing


_formats: list[StorageFormat] = []


def register_format(storage: StorageFormat) -> None:
    """Have quantised weights read by this format as well, after those that are registered already."""
    _formats.append(storage)


def stored_in(module: nn.Module) -> Stored | None:
    """Return the quantised weight of a linear layer; ``None`` for any other module, and one that cannot be read."""
    weight = module._parameters.get("weight")
    if weight is None or not is_quantized(weight):
        return None
    if isinstance(found := getattr(weight, _META_FORMAT, None), MetaFormat):
        return found
    readings = (storage.read(module, weight) for storage in _formats)
    return next((stored for stored in readings if stored is not None), None)


def keep_unpacked(model: nn.Module) -> None:
    """Keep quantised layers from packing their weights in a way that no gradient passes through."""
    for storage in _formats:
        storage.keep_trainable(model)


#: Attribute of a parameter on meta: the format that it stands for.
_META_FORMAT = "trady_meta_format"


class MetaFormat:
    """A quantised weight in a copy of the model without memory; it takes as many bytes.

    Args:
        like: The weight.

    """

    def __init__(self, like: Stored) -> None:
        self.shape, self.dtype, self.copies = like.shape, like.dtype, like.copies
        # Of a weight that is listed twice (bitsandbytes) the bytes count once.
        sizes = {t.untyped_storage()._cdata: t.nbytes for t in like.tensors()}
        self._bytes = sum(sizes.values())

    def parameter(self) -> nn.Parameter:
        """The parameter that stands for the weight."""
        found = nn.Parameter(torch.empty(self._bytes, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        setattr(found, _META_FORMAT, self)
        return found

    def dense(self) -> Tensor:
        """Take the memory that dequantising takes."""
        made = [torch.empty(self.shape, dtype=self.dtype, device="meta") for _ in range(self.copies)]
        return made.pop()

    def tensors(self) -> Iterable[Tensor]:
        """Return nothing: the parameter that stands for it takes all."""
        return ()


def inner_tensors(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that a wrapper subclass (torchao) is made of; of any other tensor itself."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [inner for part in parts if isinstance(part, Tensor) for inner in inner_tensors(part)]
