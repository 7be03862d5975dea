"""How each library keeps a quantised weight, and how it is read: the one place that knows torchao and bitsandbytes.

Classes are told apart by what they have; neither library is imported before a weight of it is read. Another library
is one more class of :class:`Stored` and one more reader.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trady.errors import TradyWarning
from trady.ops.quantized import is_linear_in_its_input, is_quantized


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
    def forms(self) -> int:
        """Tensors that the library makes of a weight while it dequantises, and of a result while it multiplies."""
        ...

    def dense(self) -> Tensor:
        """Dequantise, into memory of its own."""
        ...

    def tensors(self) -> Iterable[Tensor]:
        """What it takes in memory, scales included."""
        ...


def inner_tensors(tensor: Any) -> list[Tensor]:
    """The plain tensors that one of torchao is made of; any other tensor itself."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [inner for part in parts if isinstance(part, Tensor) for inner in inner_tensors(part)]


class _Torchao:
    """A weight-only quantised tensor of torchao."""

    forms = 2  # before and after the scales

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


class _FourBits:
    """``Params4bit`` of bitsandbytes: [elements / 2, 1] bytes, and scales in its ``quant_state``."""

    forms = 1

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
    """``Int8Params`` of bitsandbytes: whole numbers, and a scale for each row, which moves at the first forward."""

    forms = 1

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


class MetaFormat:
    """Stands for a quantised weight in a copy of the model without memory; it takes as many bytes.

    Args:
        like: The weight.

    """

    def __init__(self, like: Stored) -> None:
        self.shape, self.dtype, self.forms = like.shape, like.dtype, like.forms
        # Of a weight that is listed twice (bitsandbytes) the bytes count once.
        sizes = {t.untyped_storage()._cdata: t.nbytes for t in like.tensors()}
        self._bytes = sum(sizes.values())

    def parameter(self) -> nn.Parameter:
        """The parameter that stands for the weight."""
        found = nn.Parameter(torch.empty(self._bytes, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        found.trady_outline = self  # type: ignore[attr-defined]
        return found

    def dense(self) -> Tensor:
        """Take the memory that dequantising takes."""
        forms = [torch.empty(self.shape, dtype=self.dtype, device="meta") for _ in range(self.forms)]
        return forms.pop()

    def tensors(self) -> Iterable[Tensor]:
        """Nothing: the parameter that stands for it takes all."""
        return ()


def _torchao(module: nn.Module, weight: Any) -> Stored | None:
    traceable = hasattr(type(weight), "__tensor_flatten__") and is_linear_in_its_input(weight)
    return _Torchao(module) if traceable and type(module).forward is nn.Linear.forward else None


def _bitsandbytes(module: nn.Module, weight: Any) -> Stored | None:
    if not any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__):
        return None
    if getattr(weight, "SCB", None) is not None or getattr(getattr(module, "state", None), "SCB", None) is not None:
        return _EightBits(module)
    four = _FourBits(module)
    return four if len(getattr(four._state, "shape", ())) == 2 else None


def _outline(module: nn.Module, weight: Any) -> Stored | None:
    found: MetaFormat | None = getattr(weight, "trady_outline", None)
    return found


_READERS: tuple[Callable[[nn.Module, Any], Stored | None], ...] = (_outline, _torchao, _bitsandbytes)


def stored_in(module: nn.Module) -> Stored | None:
    """The quantised weight of a linear layer; ``None`` for any other module, and one that cannot be read."""
    weight = module._parameters.get("weight")
    if weight is None or not is_quantized(weight):
        return None
    return next((found for reader in _READERS if (found := reader(module, weight)) is not None), None)


def keep_unpacked(model: nn.Module) -> None:
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
