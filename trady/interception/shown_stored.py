"""What is seen of a weight that is stored quantised and whose channels train, beside its gradient.

It is one in floating point to loops alone (:mod:`trady.interception.shown_weights`). PyTorch and the library that has
quantised it copy it, write it and read it as what it is. A loss that is computed of it would have no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from trady.calls.questions import is_metadata
from trady.errors import StateError
from trady.model.prepared import plain_class

#: Names of functions that copy a weight, or read it, without computing with it.
_NAMES = """
    __get__ __set__ _has_compatible_shallow_copy_type detach clone to cpu cuda contiguous dequantize requires_grad_
    data_ptr untyped_storage tolist numpy item __repr__ __deepcopy__ __reduce_ex__
"""
_COPIES = frozenset(_NAMES.split())


class ShownStored:
    """What a shown weight has in the place of its own class's, if it is stored quantised."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        copies = is_metadata(func) or getattr(func, "__name__", "") in _COPIES
        if torch.is_grad_enabled() and not copies:
            raise StateError(
                f"{getattr(func, '__name__', func)} of a weight that is stored as {cls.__name__} has no gradient: take "
                "a penalty of tuner.parameters(), which holds its channels, or call it under torch.no_grad()"
            )
        with _plain(*tree_iter((args, kwargs or {}))):
            return func(*args, **(kwargs or {}))

    # The libraries' own methods make a weight of the new tensor, with the flag that they read from this one.

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move, or change the type."""
        with _plain(self):
            return self.to(*args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        """Move to the CPU."""
        with _plain(self):
            return self.cpu(*args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a GPU."""
        with _plain(self):
            return self.cuda(*args, **kwargs)

    def __repr__(self) -> str:
        with _plain(self):
            return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with _plain(self):
                memo[id(self)] = copy.deepcopy(self, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain(self):
            return self.__reduce_ex__(protocol)


@contextmanager
def _plain(*leaves: Any) -> Iterator[None]:
    """Let shown weights among these have their own class for a while."""
    shown: list[tuple[Any, type[nn.Parameter]]] = [
        (leaf, type(leaf)) for leaf in leaves if issubclass(type(leaf), ShownStored)
    ]
    for weight, kind in shown:
        weight.__class__ = plain_class(kind)
    try:
        yield
    finally:
        for weight, kind in shown:
            weight.__class__ = kind
