"""Runs a model without memory as if it had some: same questions answered, same kernels chosen."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from trady.batching import in_place
from trady.composites import COMPOSITES, WITHOUT_MEMORY
from trady.labels import asking_for_ourselves, standing_for
from trady.recognize import answer_about_device, is_metadata
from trady.rewording import reworded
from trady.trace import tensors_among


class StandIns(TorchFunctionMode):
    """Lets a model without memory run with ids and masks that have values.

    What meets a tensor without memory loses its own, for good where it is written to; asked where they are, all say the
    real device, so that models put the tensors they make there.

    Args:
        device: The real device.
        on_replaced: Told of a tensor with values that another one stands for from now on.

    """

    def __init__(self, device: torch.device, on_replaced: Callable[[Tensor], object] | None = None) -> None:
        super().__init__()
        self._device, self._on_replaced = device, on_replaced
        self._before: list[Token[str]] = []
        self._written = WeakIdKeyDictionary()

    def __enter__(self) -> StandIns:
        self._before.append(standing_for.set("cpu" if self._device.type == "meta" else self._device.type))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        standing_for.reset(self._before.pop())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func):
            answer = None if asking_for_ourselves.get() else answer_about_device(func, self._device)
            return func(*args, **kwargs) if answer is None else answer
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        func, args, kwargs = reworded(func, args, kwargs)
        args, kwargs = self.prepare(func, args, kwargs)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attention(self._device, *args, **kwargs)
        if func in WITHOUT_MEMORY and args[0].is_meta:
            func = WITHOUT_MEMORY[func]
        return func(*args, **kwargs)

    def prepare(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the values from all arguments if some of them have none."""
        if self._written:
            args, kwargs = tree_map(self._now, (args, kwargs))
        meta = [t.is_meta for t in tensors_among((*args, *kwargs.values()))]
        on_device = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        if not any(meta) or (all(meta) and not on_device):
            return args, kwargs
        target = args[0] if in_place(func) and args and isinstance(args[0], Tensor) else None
        if target is not None and not target.is_meta and target.is_floating_point():  # models look at ids and masks
            whole = target if target._base is None else target._base
            if self._on_replaced is not None:
                self._on_replaced(whole)
            self._written[whole] = _without_values(whole)
            args = (self._now(target), *args[1:])
        args, kwargs = tree_map(_without_values, (args, kwargs))
        return args, kwargs

    def _now(self, value: Any) -> Any:
        """What stands for a tensor into which something without values has been written."""
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        whole = value._base
        if whole is None:
            return self._written.get(value, value)
        stands = self._written.get(whole)
        return value if stands is None else stands.as_strided(value.shape, value.stride(), value.storage_offset())


def _without_values(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _attention(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as the real device would: its fused kernel keeps no attention matrix, the plain formula does."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if device.type == "cpu":
        with _disable_current_modes(), torch.no_grad():
            real = [None if t is None else _thin(t) for t in (query, key, value, attn_mask)]
            choice = torch._fused_sdp_choice(*real, dropout_p, is_causal, **options)  # type: ignore[call-arg, arg-type]
        if choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # the kernel's own copy
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
            return out
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _thin(tensor: Tensor) -> Tensor:
    """A real tensor of this shape that takes the memory of its last dimension only."""
    size = tensor.shape[-1] if tensor.dim() else 1
    return torch.zeros(size, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
