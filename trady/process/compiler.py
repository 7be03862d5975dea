"""PyTorch's compiler and its symbolic shapes, not imported until something is compiled.

The first optimizer, and the first operation on the meta device, import ``torch._dynamo`` and
``torch.fx.experimental.symbolic_shapes``, with sympy and 800 modules: 70 to 90 MiB that stay for good. An eager process
needs little of them, and knows the answers. ``disable(function)`` keeps the compiler out of a function,
``graph_break()`` ends what is being compiled: where nothing is, neither does anything. And what is said of a symbolic
number or truth is plain where the number is an ``int`` and the truth a ``bool``.

When something is compiled after all, the real modules come, and functions that were to be kept from the compiler are
(:mod:`trady.process.postponed`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from operator import and_, or_
from typing import Any

import torch

from trady.process.postponed import ASK, PostponedModule, postpone

COMPILER, SHAPES, ALGEBRA = "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"

#: What ``torch._compile`` keeps on a function when the compiler has been kept out of it.
_KEPT_OUT = "__dynamo_disable"

#: Functions that PyTorch looks up whether it calls them or not.
_ASKED_IN_CALLS = (
    "_constrain_range_for_size",
    "constrain_range",
    "free_unbacked_symbols",
    "guarding_hint_or_throw",
    "has_free_unbacked_symbols",
    "has_guarding_hint",
)

_left_alone: list[Callable[..., Any]] = []


def wait_for_compiler() -> bool:
    """Let the compiler wait until it is needed; return whether it does. It does not where it is there already."""
    shapes = postpone(
        SHAPES,
        {
            **dict.fromkeys(("expect_true", "guard_bool", "guard_or_false", "guard_or_true"), _plain_truth),
            **dict.fromkeys(("statically_known_true", "guard_size_oblivious"), _plain_truth),
            "statically_known_false": _plain_falsehood,
            "guard_int": _plain_number,
            "sym_and": lambda *given: _joined(and_, given),
            "sym_or": lambda *given: _joined(or_, given),
            "sym_eq": _equal,
            **dict.fromkeys(_ASKED_IN_CALLS, lambda *args, **kwargs: ASK),
            "is_nested_int": lambda number: ASK if isinstance(number, torch.SymInt) else False,
        },
    )
    compiler = postpone(
        COMPILER,
        {"disable": _disable, "graph_break": lambda *args, **kwargs: None, "is_compiling": lambda: False},
        gone=_keep_out,
    )
    # Whether an operand is an expression: asked for every operation on the meta device.
    postpone(ALGEBRA, {}, {"Basic": ("torch", "torch._prims_common")})
    postpone("torch.utils._sympy.functions", {}, {"Max": ("torch._prims_common",)})
    return shapes is not None and compiler is not None


def compiler_is_loaded() -> bool:
    """Whether anything can be compiled yet: ``torch.compile`` loads its parts when it is first called."""
    return not isinstance(sys.modules.get(COMPILER), PostponedModule | None)


def _disable(fn: Any = None, *args: Any, **kwargs: Any) -> Any:
    # PyTorch's own functions ask again when they are told to; what a person keeps from the compiler is wrapped once.
    if fn is None or kwargs != {"wrapping": False}:
        return ASK
    _left_alone.append(fn)
    return fn


def _keep_out() -> None:
    """Let functions ask the real compiler the next time that they are called."""
    for function in _left_alone:
        if hasattr(function, _KEPT_OUT):
            delattr(function, _KEPT_OUT)
    _left_alone.clear()


def _plain_truth(given: Any, *args: Any, **kwargs: Any) -> Any:
    return given if type(given) is bool else ASK


def _plain_falsehood(given: Any) -> Any:
    return not given if type(given) is bool else ASK


def _plain_number(given: Any) -> Any:
    return given if type(given) is int else ASK


def _joined(how: Callable[[Any, Any], Any], given: tuple[Any, ...]) -> Any:
    return reduce(how, given) if given and all(type(each) is bool for each in given) else ASK


def _equal(one: Any, other: Any) -> Any:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        if len(one) != len(other):
            return False
        answers = [_equal(*pair) for pair in zip(one, other, strict=True)]
        return ASK if any(answer is ASK for answer in answers) else all(answers)
    return one == other if isinstance(one, int) and isinstance(other, int) else ASK
