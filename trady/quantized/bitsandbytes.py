"""Weights that bitsandbytes has quantised: 4 bits (NF4, FP4) or 8 bits, in linear layers of its own."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trady.errors import TradyWarning
from trady.quantized.formats import StorageFormat, Stored


class _FourBits:
    """``Params4bit`` of bitsandbytes: [elements / 2, 1] bytes, and scales in its ``quant_state``."""

    copies = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def _state(self) -> Any:
        return getattr(self._module.weight, "quant_state", None) or getattr(self._module, "quant_state", None)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._state.shape)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._state.dtype
        return found

    def dense(self) -> Tensor:
        weight: Any = self._module.weight
        functional = importlib.import_module("bitsandbytes.functional")
        found: Tensor = functional.dequantize_4bit(weight.data.view(-1, 1), self._state)
        return found

    def tensors(self) -> Iterable[Tensor]:
        states = [self._state, self._state.state2]
        found = [getattr(state, name, None) for state in states for name in ("absmax", "code", "offset")]
        return [self._module.weight.data, *(t for t in found if isinstance(t, Tensor))]  # type: ignore[list-item]


class _EightBits:
    """``Int8Params`` of bitsandbytes: integers, and a scale a row; both change their place at the first forward."""

    copies = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def _part(self, name: str) -> Any:
        found = getattr(self._module.weight, name, None)
        return getattr(self._module.state, name, None) if found is None else found

    @property
    def shape(self) -> torch.Size:
        weight: Any = self._module.weight
        return torch.Size(weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._part("SCB").dtype
        return found

    def dense(self) -> Tensor:
        scale, numbers = self._part("SCB"), self._part("CB")
        found: Tensor = numbers.to(scale.dtype).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))
        return found

    def tensors(self) -> Iterable[Tensor]:
        return [self._module.weight.data, self._part("CB"), self._part("SCB")]


def _read(module: nn.Module, weight: Any) -> Stored | None:
    if not any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__):
        return None
    if getattr(weight, "SCB", None) is not None or getattr(getattr(module, "state", None), "SCB", None) is not None:
        return _EightBits(module)
    four = _FourBits(module)
    return four if len(getattr(four._state, "shape", ())) == 2 else None


def _keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit layers of bitsandbytes from repacking themselves for inference: no gradient passes afterwards."""
    kept = False
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.device.type != "cpu":
            continue
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # unpacks
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            kept = True
    if kept:
        warnings.warn(
            "bitsandbytes repacks 4-bit weights in evaluation mode on this CPU, and then no gradient passes through "
            "them: module.support_avx512bf16_for_cpu is False from now on, which turns that off",
            TradyWarning,
            stacklevel=2,
        )


BITSANDBYTES = StorageFormat(_read, _keep_unpacked)
