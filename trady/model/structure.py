"""Tensors in what a model is called with: in containers, mappings and objects of any class, dense and sparse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.errors import ModelError
from trady.model.python_state import PythonState

#: What holds no tensor that a model would be given.
_PLAIN = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    torch.dtype,
    torch.device,
    torch.Generator,
    nn.Module,
    type,
)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, as often as they occur; those in one object of an own class once each."""
    for leaf in tree_iter(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif not isinstance(leaf, _PLAIN):
            yield from reversed(PythonState([leaf]).tensors)  # they are found from the last to the first


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Copy a value with other tensors in it; a tensor that occurs twice is changed once.

    Raises:
        ModelError: An object of an own class cannot be copied.

    """
    changed: dict[int, Any] = {}
    known: list[Tensor] = []  # an identity is good for as long as its tensor lives

    def changed_once(tensor: Tensor) -> Any:
        if id(tensor) not in changed:
            known.append(tensor)
            changed[id(tensor)] = change(tensor)
        return changed[id(tensor)]

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return changed_once(leaf)
        tensors = [] if isinstance(leaf, _PLAIN) else PythonState([leaf]).tensors
        if not tensors:
            return leaf
        try:
            return copy.deepcopy(leaf, {id(tensor): changed_once(tensor) for tensor in tensors})
        except Exception as error:
            raise ModelError(
                f"the example holds a {type(leaf).__name__} that cannot be copied ({type(error).__name__}: {error}): "
                "pass its tensors as a tuple or a dict, or a copy of it that holds tensors and numbers alone"
            ) from error

    return tree_map(of_leaf, value)


def components(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one is stored in; a dense one as it is."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def is_sparse(tensor: Tensor) -> bool:
    """Whether a tensor stores some of its elements only."""
    return tensor.layout is not torch.strided and len(components(tensor)) > 1
