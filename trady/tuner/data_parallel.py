"""DistributedDataParallel around a model that is armed: it scatters and says when to average; the tuner averages.

A wrapper makes buckets for every parameter that requires a gradient when it is built, and waits for all of them. One
that was built before the model was prepared would wait for weights that do not train any more; one built afterwards has
buckets for the head alone, and none where there is no head. So at the first forward pass through it, its reducer is
exchanged for one that leaves the armed model alone: all that trains is averaged by :mod:`trady.tuner.reduction`.
When the tuner has finished, the wrapper gets a reducer for what requires a gradient then.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trady.process.ranks import processes

_ASKS = "torch.nn.parallel.distributed"


class Wrappers:
    """The wrappers that forward passes of a model come through.

    Args:
        model: The armed model.
        has_head: Whether anything of it requires a gradient as wrappers see it. Without, they would refuse to be built.

    Attributes:
        group: The processes of the wrapper, where it has some of its own; ``None`` is all of them.
    """

    def __init__(self, model: nn.Module, *, has_head: bool) -> None:
        self._model = model
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self._options: weakref.WeakKeyDictionary[Any, tuple[bool, bool]] = weakref.WeakKeyDictionary()
        self.group: Any = None
        self._placeholder: nn.Parameter | None = None
        if not has_head and processes() > 1 and "named_parameters" not in vars(model):
            self._placeholder = _placeholder(model)
            vars(model)["named_parameters"] = _showing(model, self._placeholder)

    def wants_gradients(self) -> bool:
        """Whether the wrapper of the forward pass that runs wants gradients averaged; true where there is none."""
        wrapper: Any = DistributedDataParallel._active_ddp_module
        if wrapper is None:
            return True
        if wrapper not in self._known:
            self._known[wrapper] = None
            self._take_over(wrapper)
        everybody = wrapper.process_group is torch.distributed.group.WORLD
        self.group = None if everybody else wrapper.process_group
        wanted: bool = wrapper.require_backward_grad_sync
        return wanted

    def _take_over(self, wrapper: Any) -> None:
        """Leave to a wrapper what trains beside the armed model."""
        ours = {id(parameter) for parameter in self._model.parameters()}
        if self._placeholder is not None:
            ours.add(id(self._placeholder))
        parameters, sparse = wrapper._build_params_for_reducer()
        theirs = [(p, kind) for p, kind in zip(parameters, sparse, strict=True) if id(p) not in ours]
        _build_reducer(wrapper, theirs or [(_placeholder(self._model), False)])
        if not theirs:
            wrapper.reducer._remove_autograd_hooks()
            self._options[wrapper] = wrapper.static_graph, wrapper.find_unused_parameters
            wrapper.static_graph = wrapper.find_unused_parameters = False  # they would wait for the placeholder

    def put_back(self) -> None:
        """Let every wrapper average what requires a gradient, from its next forward pass on."""
        if self._placeholder is not None:
            vars(self._model).pop("named_parameters", None)
        for wrapper in list(self._known):
            if wrapper in self._options:
                wrapper.static_graph, wrapper.find_unused_parameters = self._options[wrapper]
            _rebuild_once(wrapper)
        self._known.clear()


def _build_reducer(wrapper: Any, parameters: Sequence[tuple[nn.Parameter, bool]]) -> None:
    given, sparse = [p for p, _ in parameters], [kind for _, kind in parameters]
    names = {index: f"parameter {index}" for index in range(len(given))}  # for its own error messages
    wrapper._ddp_init_helper(given, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False


def _rebuild_once(wrapper: Any) -> None:
    """Build the reducer at the next forward pass with gradients: its buckets are as large as all that trains."""

    def rebuild(module: Any, args: Any) -> None:
        if torch.is_grad_enabled() and wrapper_of() is not None:
            handle.remove()
            parameters, sparse = module._build_params_for_reducer()
            if parameters:
                _build_reducer(module, list(zip(parameters, sparse, strict=True)))

    wrapper_of = weakref.ref(wrapper)
    handle = wrapper.register_forward_pre_hook(rebuild)


def _placeholder(model: nn.Module) -> nn.Parameter:
    """A parameter without a gradient, for a reducer that must have one."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return nn.Parameter(torch.zeros(1, device=device))


def _showing(model: nn.Module, placeholder: nn.Parameter) -> MethodType:
    """Return a ``named_parameters`` that shows one more to wrappers that are being built; of a copy, its own alone."""
    original = weakref.ref(model)

    def named_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from type(self).named_parameters(self, *args, **kwargs)
        # A generator that is run by the wrapper's own frame.
        if self is original() and sys._getframe(1).f_globals.get("__name__") == _ASKS:
            yield "_trady_placeholder", placeholder

    return MethodType(named_parameters, model)
