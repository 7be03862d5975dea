"""PyTorch functions that are read call by call, though PyTorch hands them over as one.

``torch.nn.functional.multi_head_attention_forward`` (``nn.MultiheadAttention``, ``nn.TransformerEncoder``) asks
whether a function mode wants to handle it as a whole. Its linear layers and its attention are what matters here: the
same code runs without that question.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F


def _without_asking(function: Any) -> Callable[..., Any]:
    surroundings = {**function.__globals__, "has_torch_function": lambda tensors: False}
    twin = FunctionType(function.__code__, surroundings, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


#: By function, the same function whose calls are seen one by one; a mode runs it inside of itself.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _without_asking(F.multi_head_attention_forward)
}
