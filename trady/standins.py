"""Runs a model without memory as if it had some: same questions answered, same kernels chosen."""

from __future__ import annotations

from contextvars import Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from trady.composites import COMPOSITES, WITHOUT_MEMORY
from trady.labels import asking_for_ourselves, standing_for
from trady.recognize import answer_about_device, is_metadata
from trady.trace import tensors_among


class StandIns(TorchFunctionMode):
    """Lets a model without memory run with ids and masks that have values.

    What meets a tensor without memory loses its own; asked where they are, all say the real device, so that
    models put the tensors they make there.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._before: list[Token[str]] = []

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
        args, kwargs = mixed_to_meta(args, kwargs)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attention(self._device, *args, **kwargs)
        if func in WITHOUT_MEMORY and args[0].is_meta:
            func = WITHOUT_MEMORY[func]
        return func(*args, **kwargs)


def mixed_to_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the values from all arguments if some of them have none."""
    values = (*args, *kwargs.values())
    meta = [t.is_meta for t in tensors_among(values)]
    if any(meta) and not (all(meta) and not any(isinstance(value, torch.device) for value in values)):
        args, kwargs = tree_map(_without_values, (args, kwargs))
    return args, kwargs


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
