"""Plain names of torch functions, and what a name tells of a function."""

from __future__ import annotations

from typing import Any


def name_of(function: Any) -> str:
    """The plain name of a torch function: ``add`` for ``torch.Tensor.__iadd__`` and ``torch.add_`` alike."""
    name = str(getattr(function, "__name__", ""))
    if name.startswith("__"):
        name = name.strip("_")
        bare = name[1:]
        return bare if name[:1] in ("i", "r") and bare in ELEMENTWISE else name
    return name.rstrip("_")


def in_place(function: Any) -> bool:
    """Whether a torch function writes into its first argument: ``torch.add_``, ``torch.Tensor.__iadd__``."""
    name = str(getattr(function, "__name__", ""))
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name.strip("_") != name_of(function))
    return name.endswith("_")


_ELEMENTWISE_NAMES = """
    add sub rsub mul div truediv floordiv true_divide neg pow exp log log1p expm1 sqrt rsqrt square reciprocal
    abs sign sin cos tanh sigmoid relu relu6 silu gelu elu selu celu mish softplus softsign hardtanh hardswish
    hardsigmoid leaky_relu logsigmoid erf erfc where masked_fill clamp clip minimum maximum fmod remainder
    float half bfloat16 double to type type_as contiguous clone detach dropout dropout1d dropout2d
    feature_dropout alpha_dropout eq ne lt gt le ge logical_and logical_or logical_not and or xor invert
    zeros_like ones_like empty_like full_like addcmul addcdiv lerp nan_to_num bool int long fill zero
    bernoulli rand_like randn_like expand_as floor ceil round trunc frac
"""

ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())

_TAKES_SIZES_NAMES = """
    view reshape expand unflatten _unsafe_view broadcast_to view_as reshape_as new_empty new_zeros new_ones new_full
"""

#: Functions that take shapes as numbers, which may grow with the batch.
TAKES_SIZES = frozenset(_TAKES_SIZES_NAMES.split())

#: Functions whose backward reads their result in place of their inputs.
BACKWARD_READS_RESULT = frozenset(["tanh", "sigmoid", "exp", "softmax", "log_softmax", "sqrt", "rsqrt", "reciprocal"])

#: Functions whose backward reads both.
BACKWARD_READS_BOTH = frozenset(["scaled_dot_product_attention"])

#: Functions whose backward reads each factor, for the gradient of the other one.
PRODUCT_NAMES = frozenset(["mul", "div", "truediv", "matmul", "bmm"])

#: Functions whose backward reads neither their inputs nor their result.
_READS_NOTHING_NAMES = """
    add sub rsub neg view reshape flatten unflatten transpose permute movedim contiguous clone unsqueeze
    squeeze expand split chunk unbind narrow select getitem cat stack roll pad dropout to float half bfloat16
    double sum mean type type_as
"""

BACKWARD_READS_NOTHING = frozenset(_READS_NOTHING_NAMES.split())
