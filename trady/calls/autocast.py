"""What autocast does to the arguments of a call: PyTorch's own does not know tensors without memory.

The lists are those of PyTorch's documentation ("Autocast Op Reference"), by the names of the Python functions. Casts
of a weight are not shared between calls, as PyTorch's are for weights that train; few do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trady.calls.names import name_of
from trady.ops.context import simulated_autocast_dtype

_NARROW_NAMES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc bmm mm baddbmm addmm addbmm
    addmv addr mv chain_matmul multi_dot linear matmul einsum bilinear scaled_dot_product_attention prelu
"""

#: Products are computed in the narrow type.
_NARROW = frozenset(_NARROW_NAMES.split())

_WIDE_ON_CPU_NAMES = """
    avg_pool3d binary_cross_entropy grid_sample polar prod quantile nanquantile stft cdist trace view_as_complex
    cholesky inverse pinverse max_pool3d max_unpool2d max_unpool3d adaptive_avg_pool3d mse_loss
    cosine_embedding_loss nll_loss hinge_embedding_loss poisson_nll_loss smooth_l1_loss cross_entropy l1_loss
    huber_loss margin_ranking_loss soft_margin_loss triplet_margin_loss multi_margin_loss ctc_loss kl_div
    multilabel_margin_loss binary_cross_entropy_with_logits
"""

_WIDE_ON_CUDA_NAMES = """
    pow rdiv rpow acos asin cosh sinh tan exp expm1 log log10 log1p log2 reciprocal rsqrt erfinv prod sum cumsum
    cumprod norm softmax log_softmax softmin softplus layer_norm group_norm normalize cdist cosine_similarity dist
    pdist renorm binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy hinge_embedding_loss kl_div
    l1_loss margin_ranking_loss mse_loss multilabel_margin_loss multi_margin_loss nll_loss poisson_nll_loss
    smooth_l1_loss soft_margin_loss triplet_margin_loss
"""

#: What is computed in float32, by the type of the device.
_WIDE = {"cpu": frozenset(_WIDE_ON_CPU_NAMES.split()), "cuda": frozenset(_WIDE_ON_CUDA_NAMES.split())}

#: What is computed in the widest type among its arguments.
_PROMOTED = frozenset(["cat", "stack", "index_copy"])


def cast(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, device: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the arguments of a call as autocast to ``dtype`` would on a device of this type."""
    name = name_of(function)
    if name in _NARROW:
        wanted = dtype
    elif name in _WIDE.get(device, ()):
        wanted = torch.float32
    elif name in _PROMOTED:
        return _promoted(args, kwargs)
    else:
        return args, kwargs
    converted: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(lambda leaf: _to(leaf, wanted), (args, kwargs))
    return converted


def cast_where_simulated(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the arguments of a call on fake tensors where autocast is simulated (trady.ops.context)."""
    dtype = simulated_autocast_dtype.get()
    return (args, kwargs) if dtype is None else cast(function, args, kwargs, dtype, device)


def _promoted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found: set[torch.dtype] = set()
    tree_map(lambda leaf: found.add(leaf.dtype) if _casts(leaf) else None, (args, kwargs))
    if len(found) < 2:
        return args, kwargs
    converted: tuple[tuple[Any, ...], dict[str, Any]]
    converted = tree_map(lambda leaf: _to(leaf, torch.float32), (args, kwargs))
    return converted


def _casts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if _casts(leaf) else leaf
