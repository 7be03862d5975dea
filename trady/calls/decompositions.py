"""PyTorch functions that trady runs in other words than PyTorch does.

Some are read call by call, though PyTorch hands them over as one:
``torch.nn.functional.multi_head_attention_forward`` (``nn.MultiheadAttention``, ``nn.TransformerEncoder``) asks whether
a function mode wants to handle it as a whole. Its linear layers and its attention are what matters here: the same code
runs without that question. Recurrent layers are kernels that show no linear layer: they are written anew
(:mod:`trady.calls.recurrent`). Others PyTorch cannot run on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.calls.packed_sequences import PACKING
from trady.calls.recurrent import RECURRENT
from trady.ops.context import device_type
from trady.ops.layout import memory_format


def _without_asking(function: Any) -> Callable[..., Any]:
    surroundings = {**function.__globals__, "has_torch_function": lambda tensors: False}
    twin = FunctionType(function.__code__, surroundings, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


#: By function, the same function whose calls are seen one by one; a mode runs it inside of itself.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _without_asking(F.multi_head_attention_forward),
    **RECURRENT,
    **PACKING,
}


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, **options: Any) -> Tensor:
    """Products with a matrix a group (experts): in memory, kept and made, like the product with one of them.

    PyTorch's own takes nothing but bfloat16 where tensors have no memory.
    """
    if mat_a.dim() != 2 or mat_b.dim() != 3 or options.get("bias") is not None:
        return torch._grouped_mm(mat_a, mat_b, **options)
    return torch.mm(mat_a, mat_b[0])


def _group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Group normalisation in the layout of its input, as the CPU does it; without memory PyTorch copies to another."""
    if device_type(input) != "cpu" or memory_format(input) is torch.contiguous_format:
        return F.group_norm(input, *args, **kwargs)
    channels_last = input.movedim(1, -1)
    made = F.group_norm(channels_last.view(input.shape), *args, **kwargs)
    return made.view(channels_last.shape).movedim(-1, 1)


#: By function, what takes its place where tensors have no memory.
META_KERNELS: dict[Any, Callable[..., Any]] = {
    F.group_norm: _group_norm,
    **({torch._grouped_mm: _grouped_mm} if hasattr(torch, "_grouped_mm") else {}),
}
