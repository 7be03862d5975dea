"""Recognises calls: which torch functions are weight layers, norms, activations, pools.

A call that is not recognised is left to PyTorch. Both the trace (before) and the interception (while
the model runs) read calls through :func:`recognize`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trady.calls.decompositions import META_KERNELS
from trady.calls.kind import Call, CallKind
from trady.calls.kinds import KINDS

_BY_CALL: dict[type[Call], CallKind[Any]] = {}

_BY_FUNCTION: dict[Any, CallKind[Any]] = {}


def register(kind: CallKind[Any]) -> None:
    """Recognise a kind of call from now on, in every model that is traced afterwards.

    Raises:
        ValueError: The type of its calls, or one of its functions, belongs to another kind.

    """
    taken = [str(function) for function in (kind.call, *kind.readers) if function in {**_BY_CALL, **_BY_FUNCTION}]
    if taken:
        raise ValueError(f"{', '.join(taken)} already belong to a registered kind of call: unregister that one first")
    _BY_CALL[kind.call] = kind
    _BY_FUNCTION.update(dict.fromkeys(kind.readers, kind))


def unregister(kind: CallKind[Any]) -> None:
    """Leave a kind of call to PyTorch again."""
    del _BY_CALL[kind.call]
    for function in kind.readers:
        del _BY_FUNCTION[function]


def kind_of(call: Call) -> CallKind[Any]:
    """The kind of a call that :func:`recognize` has returned."""
    return _BY_CALL[type(call)]


def may_be_recognized(function: Any) -> bool:
    """Whether some calls of a torch function are of a kind that is known."""
    return function in _BY_FUNCTION


def recognize(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Return what a call of a torch function means, or ``None`` for calls that stay as they are."""
    kind = _BY_FUNCTION.get(function)
    if kind is None:
        return None
    try:
        call: Call | None = kind.readers[function](*args, **kwargs)
    except TypeError:  # a signature that the reader does not know: PyTorch's own business
        return None
    return call


def run_on_meta(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do a call on fake tensors, where PyTorch's own kernel may refuse or keep something else."""
    call = recognize(function, args, kwargs)
    on_meta = None if call is None else kind_of(call).on_meta
    if on_meta is not None:
        return on_meta(call)
    return META_KERNELS.get(function, function)(*args, **kwargs)


for _kind in KINDS:
    register(_kind)
