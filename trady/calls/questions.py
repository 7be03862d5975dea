"""Calls that ask a tensor about itself, or draw random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F


def is_metadata(function: Any) -> bool:
    """Whether a torch function reads a tensor's shape or kind but none of its elements."""
    return function in _METADATA


def draws_numbers(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call takes numbers out of a random generator."""
    if function is F.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    name = str(getattr(function, "__name__", "")).rstrip("_")
    if "dropout" in name:
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and probability > 0
    return name in _RANDOM


def answer_about_device(function: Any, device: torch.device) -> Any:
    """What a tensor on ``device`` answers when it is asked where it is; ``None`` for other questions.

    Fake tensors stand for real ones, and models make further tensors where those are.
    """
    answer = _DEVICE_QUESTIONS.get(function)
    return None if answer is None else answer(device)


#: Functions that draw, in place or not, besides dropout.
_RANDOM_NAMES = """
    bernoulli multinomial normal uniform random exponential geometric cauchy log_normal poisson rand randn randint
    randperm rand_like randn_like randint_like rrelu gumbel_softmax
"""

_RANDOM = frozenset(_RANDOM_NAMES.split())

#: Properties and methods of a tensor that read its shape or kind only.
_METADATA_PROPERTIES = """
    shape dtype device ndim requires_grad is_cuda is_cpu is_meta is_leaf is_sparse is_quantized is_mkldnn is_nested
    is_mps is_xpu layout names itemsize nbytes grad_fn _version retains_grad output_nr
"""

_METADATA_METHODS = """
    size dim numel stride nelement ndimension is_contiguous is_floating_point is_complex element_size storage_offset
    get_device __len__ is_signed is_inference
"""

_METADATA = frozenset(
    [getattr(torch.Tensor, n).__get__ for n in _METADATA_PROPERTIES.split() if hasattr(torch.Tensor, n)]
    + [getattr(torch.Tensor, n) for n in _METADATA_METHODS.split()]
)

_DEVICE_QUESTIONS: dict[Any, Callable[[torch.device], Any]] = {
    torch.Tensor.device.__get__: lambda device: device,
    torch.Tensor.is_meta.__get__: lambda device: device.type == "meta",  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    torch.Tensor.is_mps.__get__: lambda device: device.type == "mps",  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda device: -1 if device.type == "cpu" else device.index or 0,
}
