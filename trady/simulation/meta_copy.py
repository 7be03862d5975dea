"""A copy of a model without memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from trady.model.batch import without_memory
from trady.model.eager import uncompiled_copy
from trady.model.parameters import own_parameters
from trady.model.python_state import PythonState
from trady.quantized.linear import meta_formats, route


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its memory, uncompiled: same modules and shapes, every tensor on the meta device."""
    memo: dict[int, Any] = meta_formats(model)
    for parameter in own_parameters(model):
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(without_memory(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = without_memory(buffer)
    for tensor in PythonState([model]).tensors:
        if not tensor.is_leaf:  # a cache; ``copy.deepcopy`` refuses what has a graph
            memo[id(tensor)] = without_memory(tensor)
    twin = uncompiled_copy(model, memo)
    route(twin)
    return twin
