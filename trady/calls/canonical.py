"""One form for calls that mean the same: a linear layer is recognised however its author has written it.

``x @ weight.T`` reads the weight through a view that knows nothing of layers; here it becomes ``linear(x, weight)``.
Sizes that are tensors become numbers, since fake tensors have no values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trady.calls.standardised import filters_of, with_weight_itself
from trady.ops.parameter_class import is_parameter_class

#: ``x @ weight``, in all forms.
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
PRODUCTS = frozenset(_PRODUCTS)

#: Where functions take the weight of a linear layer.
_WEIGHT_AT = {**dict.fromkeys(_PRODUCTS, 1), F.linear: 1, torch.addmm: 2}

_TRANSPOSITION_NAMES = "t transpose permute swapaxes swapdims"

_TRANSPOSITIONS = frozenset(
    [
        *(getattr(owner, name) for owner in (torch, Tensor) for name in _TRANSPOSITION_NAMES.split()),
        Tensor.T.__get__,  # type: ignore[attr-defined]
        Tensor.mT.__get__,  # type: ignore[attr-defined]
    ]
)

_SIZED_NAMES = "view reshape expand repeat chunk narrow as_strided unflatten new_zeros new_ones new_empty new_full"

#: Functions that take sizes after the tensor.
SIZED = frozenset(
    getattr(owner, name) for owner in (torch, Tensor) for name in _SIZED_NAMES.split() if hasattr(owner, name)
)


def transposes_weight(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call transposes a weight: what is done with the view afterwards says what it is for."""
    return function in _TRANSPOSITIONS and bool(args) and is_parameter_class(type(args[0])) and args[0].dim() == 2


def transposed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Do such a call; the view remembers its weight."""
    view: Tensor = function(*args, **kwargs)
    if view is not args[0] and view.stride() == args[0].stride()[::-1]:
        view.trady_transposes = args[0]  # type: ignore[attr-defined]
    return view


def untransposed(tensor: Tensor) -> Tensor:
    """Return the weight of which a tensor is the transpose or the filters, or else the tensor."""
    filters = filters_of(tensor)
    return getattr(tensor, "trady_transposes", tensor) if filters is None else filters.weight


def _as_number(size: Any) -> Any:
    if isinstance(size, (list, tuple)):
        return [_as_number(value) for value in size]
    number = isinstance(size, Tensor) and not (size.dim() or size.is_meta or size.is_floating_point())
    return int(size) if number else size


def _einsum(equation: Any, x: Any = None, weight: Any = None, *others: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the linear layer that a sum over a weight's rows or columns is, if it is one."""
    if not isinstance(equation, str) or others or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return None
    terms, arrow, out = equation.replace(" ", "").partition("->")
    of_x, _, of_weight = terms.partition(",")
    rest, summed = of_x[:-1], of_x[-1:]
    kept = of_weight.replace(summed, "", 1)
    plain = arrow and len(of_weight) == 2 and len(kept) == 1 and summed not in rest + kept and kept not in rest
    if not plain or out != rest + kept or len({*rest.replace("...", "")}) != len(rest.replace("...", "")):
        return None
    return (F.linear if of_weight[1] == summed else torch.matmul), (x, weight)


def canonical(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the same call with the weight itself in place of its transpose, and numbers in place of sizes in tensors.

    Args:
        function: The torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    """
    if function in SIZED:
        return function, (*args[:1], *map(_as_number, args[1:])), {k: _as_number(v) for k, v in kwargs.items()}
    if function is torch.functional.einsum:
        linear = _einsum(*args)
        return (function, args, kwargs) if linear is None else (*linear, kwargs)
    if (standardised := with_weight_itself(function, args, kwargs)) is not None:
        return standardised
    place = _WEIGHT_AT.get(function)
    factor = args[place] if place is not None and len(args) == place + 1 and not kwargs else None
    weight = getattr(factor, "trady_transposes", None)
    if weight is None:
        return function, args, kwargs
    if function is F.linear:
        return torch.matmul, (args[0], weight), kwargs
    if function is not torch.addmm:
        return F.linear, (args[0], weight), kwargs
    return (F.linear, (args[1], weight, args[0]), kwargs) if args[0].dim() == 1 else (function, args, kwargs)
