"""What is decided once of a place in a traced forward pass, and done there in every pass that follows the trace.

Who a call is, what the plan wants of it and which of its arguments matter depend on its place alone. The first pass
asks all of that and leaves an answer in the place; a later pass that comes by with the same function and the same
parameters pays a comparison and a call. Whatever differs is asked again, as if there were no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.analysis.fusion import FusionPlan
from trady.calls.actions import Action, Done, Leave
from trady.calls.canonical import PRODUCTS, SIZED
from trady.calls.kind import Bound
from trady.calls.kinds.smooth import SMOOTH
from trady.calls.recognize import kind_of, may_be_recognized, recognize
from trady.interception.handlers import Handlers
from trady.ops.parameter_class import is_parameter_class
from trady.trace.batch_counters import READS_ONE

#: Types of arguments that hold no tensor.
SCALARS = frozenset(
    [
        *(int, float, bool, str, type(None), type(Ellipsis), torch.Size),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    ]
)

#: Functions whose calls are read in other words if an argument is a transposed weight.
_PRODUCTS = frozenset([*PRODUCTS, F.linear, torch.addmm, torch.functional.einsum])


#: Whether arguments are still those of a call that its place knows.
Guard = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]


#: Functions whose calls are told apart by their options alone, not by shapes.
_READ_BY_OPTIONS = frozenset([F.dropout, torch.dropout])


class Place:
    """The answer of one place.

    Attributes:
        function: The torch function that comes here.
        compute: Computes the call from its arguments, or returns ``NotImplemented`` where they are others than those
            that it was bound with; ``None`` leaves it to PyTorch.
        commits: Whether the pass must follow the plan from here on.
        module: The innermost module that calls it; ``None`` where the model does not decide its way.
        types: Types of positional arguments with which a call without others fits; ``None`` where more must be asked.
    """

    __slots__ = ("_guard", "_parameters", "commits", "compute", "function", "module", "types")

    def __init__(
        self,
        function: Any,
        compute: Bound | None,
        parameters: tuple[int, ...] | None,
        guard: Guard | None = None,
        args: tuple[Any, ...] = (),
        *,
        commits: bool = False,
        module: str | None = None,
    ) -> None:
        self.function, self.compute, self.commits, self.module = function, compute, commits, module
        self._parameters, self._guard = None if parameters is None else list(parameters), guard
        types = tuple(map(type, args))
        plain = not parameters and guard in (None, _sizes_are_numbers) and types[:1] == (Tensor,)
        plain = plain and all(kind in SCALARS or (kind is Tensor and guard is None) for kind in types[1:])
        self.types = types if plain and parameters is not None else None

    @property
    def hands_on(self) -> bool:
        """Whether the call was computed with one before it: its input is its result."""
        return self.compute is _hand_on

    @property
    def is_bound(self) -> bool:
        """Whether the call looks at its arguments itself."""
        return self.compute is not None and self._parameters is None

    @property
    def goes_by_parameters(self) -> bool:
        """Whether nothing but the parameters of a call tells whether it is the one that came here before."""
        return self._guard is None and self._parameters is not None

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether arguments are of the kind that came here before; layers look for themselves."""
        wanted = self._parameters
        if wanted is None:
            return True
        found = parameters_among(args)
        if kwargs and found is not None:
            named = parameters_among(kwargs.values())
            found = None if named is None else found + named
        return found == wanted and has_tensor(args) and (self._guard is None or self._guard(args, kwargs))


def parameters_among(args: Iterable[Any]) -> list[int] | None:
    """Identities of the parameters among plain arguments; ``None`` where there is anything that is not plain."""
    found: list[int] = []
    for value in args:
        kind = type(value)
        if kind is Tensor or kind in SCALARS:
            continue
        if is_parameter_class(kind):
            found.append(id(value))
        elif kind is list or kind is tuple:
            inside = parameters_among(value)
            if inside is None:
                return None
            found += inside
        elif kind is not slice or not _is_plain(value):
            return None
    return found


def _is_plain(cut: slice) -> bool:
    return type(cut.start) in SCALARS and type(cut.stop) in SCALARS and type(cut.step) in SCALARS


def has_tensor(args: tuple[Any, ...]) -> bool:
    """Whether the first argument is a tensor, or a list that begins with one."""
    first = args[0] if args else None
    if type(first) is list or type(first) is tuple:
        first = first[0] if first else None
    return isinstance(first, Tensor)


def bind(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: FusionPlan,
    index: int,
    handlers: Handlers,
    commit: Callable[[], None],
) -> Place | None:
    """Return the answer of the place of a call that has just been computed; ``None`` where it is to be asked again.

    Args:
        function: The torch function, in canonical words.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plan: What the plan says of the model.
        index: Its place.
        handlers: Compute the calls of the model.
        commit: Called when a value was put off or overwritten.

    """
    step = plan.steps[index]
    if isinstance(step.action, Leave) or function in READS_ONE or not has_tensor(args):
        return None
    place = partial(Place, function, module=step.module if plan.decisions else None)
    guard = _guard(function)
    if isinstance(step.action, Done):
        return place(_hand_on, step.parameters, guard, args, commits=True)
    call = recognize(function, args, kwargs)
    if call is None:
        if function in _READ_BY_OPTIONS:
            guard = _same_options(args, kwargs)
        elif may_be_recognized(function) and function not in PRODUCTS:  # a product is recognised by its parameter
            return None
        return place(None, step.parameters, guard, args)
    bound = bound_call(function, args, kwargs, step.action, handlers, commit)
    parameters = None if kind_of(call).bind is not None and bound is not None else step.parameters
    return place(bound, parameters, guard, args)


def bound_call(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    action: Action | None,
    handlers: Handlers,
    commit: Callable[[], None],
    *,
    graph_only: bool = False,
) -> Bound | None:
    """Return what computes a call that comes again with other activations; ``None`` is PyTorch's own function.

    Args:
        function: The torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        action: How the plan wants it computed.
        handlers: Compute the calls of the model.
        commit: Called when a value was put off or overwritten.
        graph_only: Whether nobody reads the values of its result.

    """
    if isinstance(action, Leave):
        return None
    if isinstance(action, Done):
        return _hand_on
    call = recognize(function, args, kwargs)
    kind = None if call is None else kind_of(call)
    if kind is None or kind.handler is None or (kind is SMOOTH and handlers.fidelity == "exact"):
        return None
    bound = None
    if kind.bind is not None:
        bound = kind.bind(call, args, kwargs, handlers.handling(action, commit, graph_only=graph_only))
    return bound or partial(handlers.again, function, action, commit, graph_only)


def _hand_on(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["input"]


def _guard(function: Any) -> Guard | None:
    if function in SIZED:
        return _sizes_are_numbers
    return _no_transposed_weight if function in _PRODUCTS else None


def _same_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Guard:
    options, named = args[1:], {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    return lambda args, kwargs: args[1:] == options and kwargs == named


def _sizes_are_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if kwargs:
        return False
    for value in args[1:]:
        if type(value) is not int and (isinstance(value, Tensor) or not _holds_no_tensor(value)):
            return False
    return True


def _holds_no_tensor(value: Any) -> bool:
    return not isinstance(value, (list, tuple)) or not any(isinstance(size, Tensor) for size in value)


def _no_transposed_weight(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return not kwargs and not any(hasattr(value, "trady_transposes") for value in args)
