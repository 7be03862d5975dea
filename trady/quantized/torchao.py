"""Weights that torchao has quantised: tensor subclasses, a parameter of an ordinary ``torch.nn.Linear``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trady.ops.quantized import is_linear_in_its_input
from trady.quantized.formats import StorageFormat, Stored, inner_tensors


class _Torchao:
    """A weight-only quantised tensor of torchao."""

    copies = 2  # before and after the scales

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def _weight(self) -> Any:
        return self._module.weight

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._weight.dtype
        return found

    def dense(self) -> Tensor:
        found: Tensor = self._weight.dequantize()
        return found

    def tensors(self) -> Iterable[Tensor]:
        return inner_tensors(self._weight)


def _read(module: nn.Module, weight: Any) -> Stored | None:
    traceable = hasattr(type(weight), "__tensor_flatten__") and is_linear_in_its_input(weight)
    return _Torchao(module) if traceable and type(module).forward is nn.Linear.forward else None


TORCHAO = StorageFormat(_read)
