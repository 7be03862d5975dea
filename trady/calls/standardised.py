"""Weights that are standardised on their way into a convolution, which is read as one call of both.

NFNet, BiT and their kin write ``batch_norm(weight.reshape(1, O, -1), None, None, gain, training=True)`` and hand the
result, in the weight's shape, to a convolution. Each tensor on that way remembers what it is made of, so that the
convolution is read as :func:`trady.ops.standardised.standardised_convolution` of the weight itself. For anybody else
who reads such a tensor it is made by a call of its own, :func:`trady.ops.standardised.standardise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from trady.ops.parameter_class import is_parameter_class
from trady.ops.standardised import standardise, standardised_convolution

_SHAPES = frozenset([torch.reshape, Tensor.reshape, Tensor.view, Tensor.reshape_as, Tensor.view_as])

_CONVOLUTIONS = frozenset([torch.conv1d, torch.conv2d, torch.conv3d])


#: Computes a call: function, positional and keyword arguments.
Compute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Filters:
    """A weight on its way into a convolution, one row a filter.

    Attributes:
        weight: The weight.
        gain: By what its filters are multiplied; ``None`` for nothing, or not yet.
        eps: Added to the variance of a filter; ``None`` while they are not standardised.
    """

    weight: Tensor
    gain: Tensor | None = None
    eps: float | None = None


def filters_of(tensor: Any) -> Filters | None:
    """What a tensor remembers of the weight that it is made of."""
    return getattr(tensor, "trady_filters", None)


def prepares_filters(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Filters | None:
    """What the result of a call has to remember; ``None`` for any other call."""
    if function in _SHAPES:
        return _shaped(args) if args and not kwargs else None
    if function is F.batch_norm and args:
        before = filters_of(args[0])
        return None if before is None or before.eps is not None else _standardised(before, *args[1:], **kwargs)
    return None


def remembering(filters: Filters, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Do such a call; on a fake tensor if the gain is one, whose values are still to come."""
    gain = filters.gain
    if function is F.batch_norm and gain is not None and gain.is_meta:
        made = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
    else:
        made = function(*args, **kwargs)
    if made is not args[0]:
        made.trady_filters = filters  # type: ignore[attr-defined]
    return made


def _shaped(args: tuple[Any, ...]) -> Filters | None:
    before = filters_of(args[0])
    if before is not None:
        return before
    if not is_parameter_class(type(args[0])) or args[0].dim() not in (3, 4, 5) or len(args) < 2:
        return None
    sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    rows = len(sizes) == 3 and not isinstance(sizes[0], Tensor) and tuple(sizes[:2]) == (1, args[0].shape[0])
    return Filters(args[0]) if rows else None


def _standardised(
    before: Filters,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Filters | None:
    alone = running_mean is None and running_var is None and bias is None and training
    return Filters(before.weight, weight, float(eps)) if alone else None


def with_weight_itself(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return a convolution with standardised filters in other words; ``None`` for any other call."""
    filters = filters_of(args[1]) if function in _CONVOLUTIONS and len(args) > 1 else None
    if filters is None or filters.eps is None or args[1].shape != filters.weight.shape:
        return None
    bias, options = (args[2], args[3:]) if len(args) > 2 else (kwargs.get("bias"), ())
    others = {name: value for name, value in kwargs.items() if name != "bias"}
    return standardised_convolution, (args[0], filters.weight, bias, filters.gain, filters.eps, *options), others


def with_values(arguments: T, compute: Compute) -> T:
    """Return arguments in which standardised weights have been computed by a call of their own."""

    def made(leaf: Any) -> Any:
        filters = filters_of(leaf) if isinstance(leaf, Tensor) else None
        if filters is None or filters.eps is None:
            return leaf
        hat = compute(standardise, (filters.weight, filters.gain, filters.eps), {})
        return hat if hat.shape == leaf.shape else compute(Tensor.view, (hat, tuple(leaf.shape)), {})

    found: T = tree_map(made, arguments)
    return found
