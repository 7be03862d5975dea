"""PyTorch functions that trady does not run as PyTorch does.

:data:`DECOMPOSITIONS` are composites whose calls a mode must see one by one, though PyTorch hands them over as one.
``torch.nn.functional.multi_head_attention_forward`` (``nn.MultiheadAttention``, ``nn.TransformerEncoder``) asks whether
a function mode wants to handle it as a whole; its linear layers and its attention are what matters here, so the same
code runs without that question. Recurrent layers are kernels that contain no linear layer: they are written as linear
layers and steps (:mod:`trady.calls.recurrent`). Packing has no kernel for fake tensors.

:data:`META_KERNELS` replace functions that PyTorch cannot run on fake tensors, or where it takes other memory there.

A new composite is an entry of one of these tables; a long one is a file whose table is joined in here.
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


#: By function, the same computation in calls that are seen one by one; a mode runs it inside of itself.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _without_asking(F.multi_head_attention_forward),
    **RECURRENT,
    **PACKING,
}


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, **options: Any) -> Tensor:
    """Multiply with one matrix a group (experts): it keeps and returns as much memory as the product with one of them.

    PyTorch's own meta kernel takes nothing but bfloat16.
    """
    if mat_a.dim() != 2 or mat_b.dim() != 3 or options.get("bias") is not None:
        return torch._grouped_mm(mat_a, mat_b, **options)
    return torch.mm(mat_a, mat_b[0])


def _group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Group normalisation in the layout of its input, as the CPU does it; PyTorch's meta kernel copies to another."""
    if device_type(input) != "cpu" or memory_format(input) is torch.contiguous_format:
        return F.group_norm(input, *args, **kwargs)
    channels_last = input.movedim(1, -1)
    out = F.group_norm(channels_last.view(input.shape), *args, **kwargs)
    return out.view(channels_last.shape).movedim(-1, 1)


#: By function, what takes its place on fake tensors.
META_KERNELS: dict[Any, Callable[..., Any]] = {
    F.group_norm: _group_norm,
    **({torch._grouped_mm: _grouped_mm} if hasattr(torch, "_grouped_mm") else {}),
}
