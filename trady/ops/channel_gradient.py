"""The gradient of a weight of which some channels train: in the weight's shape, with memory for those channels alone.

A masked gradient: zero everywhere else. What loops do with gradients most (norms, factors, clamps, zero) is computed
on the channels; for anything else the dense gradient exists as long as the call takes. Whatever is written into it,
also through a view, is written into the channels, and dropped elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

from trady.ops.selected import SelectedChannels, gather_channels, scatter_channels_

_aten = torch.ops.aten

#: A view of a tensor: ``view(tensor)``.
View = Callable[[Tensor], Any]


@dataclass(frozen=True)
class WeightChannels:
    """Where the selected channels of a weight are.

    Attributes:
        shape: Of the weight.
        stride: Of the weight.
        kind: How its layer computes (:func:`trady.ops.selected.channel_major`).
        groups: Of its layer.
        selected: The channels.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    kind: str
    groups: int
    selected: SelectedChannels = field(compare=False)

    def gather(self, dense: Tensor) -> Tensor:
        """Copy the channels of a tensor like the weight."""
        self.selected.check_current()
        return gather_channels(dense, self.kind, self.groups, self.selected)

    def spread(self, values: Tensor) -> Tensor:
        """Make a tensor like the weight, zero but for the channels."""
        dense = torch.empty_strided(self.shape, self.stride, dtype=values.dtype, device=values.device).zero_()
        scatter_channels_(dense, self.kind, self.groups, self.selected, values)
        return dense


class ChannelGradient(Tensor):
    """A masked gradient, or a view of one.

    Args:
        values: Gradient of the selected channels; shared, not copied.
        channels: Where they are in the weight.
        views: What this is of the weight's gradient: views, one after another.
        like: A tensor without memory that is like this one; ``None`` where there is no view.
    """

    held: Tensor
    channels: WeightChannels
    views: tuple[View, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, values: Tensor, channels: WeightChannels, views: tuple[View, ...] = (), like: Tensor | None = None
    ) -> ChannelGradient:
        """Make the tensor, which has no memory of its own."""
        shape, stride = (channels.shape, channels.stride) if like is None else (like.shape, like.stride())
        made: ChannelGradient = Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=values.dtype, device=values.device
        )
        made.held, made.channels, made.views = values, channels, views
        return made

    def dense(self) -> Tensor:
        """Return a copy that is a tensor like any other."""
        return self._seen(self.channels.spread(self.held)).clone()

    def _seen(self, whole: Tensor) -> Tensor:
        for view in self.views:
            whole = view(whole)
        return whole

    # Of subclasses, PyTorch refuses these.

    def numpy(self, *, force: bool = False) -> Any:
        """Return a dense copy, which cannot be written to."""
        array = self.dense().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Return all elements as Python numbers."""
        return self.dense().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dense())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view and isinstance(args[0], ChannelGradient):
            return _view(args[0], func, args[1:], kwargs)
        if _by_channel(func, args, kwargs):
            out = func(*tree_map(_values, args), **kwargs)
            return args[0] if func in _IN_PLACE else out
        return _dense_call(func, args, kwargs)


def _view(gradient: ChannelGradient, func: Any, others: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meta = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype, device="meta")
    made, structure = tree_flatten(func(meta, *others, **kwargs))

    def place(number: int) -> View:
        return lambda whole: tree_flatten(func(whole, *others, **kwargs))[0][number]

    views = gradient.views
    shown = [
        ChannelGradient(gradient.held, gradient.channels, views if func in _SAME else (*views, place(number)), like)
        for number, like in enumerate(made)
    ]
    return structure.unflatten(shown)


def _dense_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a call on dense gradients, and write back what it has written."""
    dense: dict[int, Tensor] = {}

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, ChannelGradient):
            return leaf
        key = id(leaf.held)
        if key not in dense:
            dense[key] = leaf.channels.spread(leaf.held)
        return leaf._seen(dense[key])

    out = func(*tree_map(whole, args), **tree_map(whole, kwargs))
    written = [leaf for leaf in tree_iter(_written(func, args, kwargs)) if isinstance(leaf, ChannelGradient)]
    for leaf in written:
        leaf.held.copy_(leaf.channels.gather(dense[id(leaf.held)]))
    return written[0] if written and isinstance(out, Tensor) else out


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def _values(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, ChannelGradient) else leaf


#: Views that show all, as it is.
_SAME = {_aten.detach.default, _aten.alias.default}

#: ``0`` stays ``0``, and every element has the same other argument.
_SCALED = {
    _aten.mul_.Scalar, _aten.mul_.Tensor, _aten.div_.Scalar, _aten.div_.Tensor, _aten.zero_.default, _aten.neg_.default,
}  # fmt: skip
_CLAMPS = {_aten.clamp_.default, _aten.clip_.default}
_IN_PLACE = _SCALED | _CLAMPS
_NORMS = {_aten.linalg_vector_norm.default, _aten._foreach_norm.Scalar}
_LISTS_SCALED = {
    _aten._foreach_mul_.Scalar, _aten._foreach_mul_.Tensor, _aten._foreach_div_.Scalar, _aten._foreach_div_.Tensor,
    _aten._foreach_zero_.default,
}  # fmt: skip


def _by_channel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call gives the same for the channels alone."""
    first, others = args[0] if args else None, args[1:]
    if func in _SCALED:
        return isinstance(first, ChannelGradient) and not first.views and all(map(_is_number, others))
    if func in _CLAMPS:
        low, high = (*others, None, None)[:2]
        whole = isinstance(first, ChannelGradient) and not first.views and not kwargs
        return whole and (low is None or low <= 0) and (high is None or high >= 0)
    if func in _LISTS_SCALED:
        return isinstance(first, list) and all(map(_is_whole, first)) and all(map(_is_number, others))
    if func in _NORMS:
        order = others[0] if others else kwargs.get("ord", 2)
        dims = [*others[1:2], kwargs.get("dim")] if func is _aten.linalg_vector_norm.default else []
        whole = all(map(_is_whole, first if isinstance(first, (list, tuple)) else (first,)))
        return whole and order > 0 and all(dim is None for dim in dims) and not kwargs.get("keepdim", len(others) > 2)
    return False


def _is_whole(leaf: Any) -> bool:
    return not isinstance(leaf, ChannelGradient) or not leaf.views


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or (not value.dim() and not isinstance(value, ChannelGradient))
