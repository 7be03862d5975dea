"""Which module is running, which one is the model, and how the model was called."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_registry

from trady.model.parameters import own_parameters
from trady.model.structure import tensors_in, with_tensors

#: Layers of what runs outside every module: before a model has run, and after.
OUTSIDE = "(outside)"
LOSS = "(loss)"


class _Recalled:
    """A plain tensor of a batch, remembered without keeping it alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._alive = weakref.ref(tensor)
        self._like = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        # Token ids and masks are small and decide what the model computes; pixels are large and do not.
        steers = not (tensor.is_floating_point() or tensor.is_complex())
        self._copy = tensor.detach().clone() if steers else None

    def __call__(self) -> torch.Tensor:
        """The tensor, or another one of the same shape in its place."""
        alive = self._alive()
        if alive is not None:
            return alive.detach()
        if self._copy is not None:
            return self._copy
        shape, stride, dtype, device = self._like
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided


@dataclass(frozen=True)
class Call:
    """How a model was called: enough to call it again, without keeping its batch alive."""

    args: Any
    kwargs: Any
    autocast: Mapping[str, torch.dtype]
    recalled: Mapping[int, _Recalled]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Remember a call that is being made."""
        autocast = {
            device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        }
        recalled: dict[int, _Recalled] = {}

        def remembered(tensor: torch.Tensor) -> torch.Tensor:
            if not _is_plain(tensor):
                return tensor
            place = torch.empty(0, device="meta")
            recalled[id(place)] = _Recalled(tensor)
            return place

        kept_args, kept_kwargs = with_tensors((args, kwargs), remembered)
        return cls(kept_args, kept_kwargs, autocast, recalled)

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments once more; floating-point tensors that are gone come back as zeros."""
        call: tuple[tuple[Any, ...], dict[str, Any]] = with_tensors(
            (self.args, self.kwargs), lambda place: self.recalled[id(place)]() if id(place) in self.recalled else place
        )
        return call


class ModuleStack:
    """Follows the modules that run, by global hooks, inside ``with``.

    The model is the one given, or else the module with the most parameters among those
    that the step calls itself (a loss module has none).

    Args:
        model: The model, if it is known.
        entered: Called with every module that the step calls itself, and with the model.
        batch: Called with the tensors that such a module was called with.
        unseen: A context in which memory is not counted.
    """

    def __init__(
        self,
        model: nn.Module | None,
        entered: Callable[[nn.Module], object],
        batch: Callable[[list[torch.Tensor]], object],
        unseen: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model = model
        self.call: Call | None = None
        self._given = model is not None
        self._size = 0
        self._entered = entered
        self._batch = batch
        self._unseen = unseen
        self._running: list[nn.Module] = []
        self._names: dict[nn.Module, tuple[nn.Module, str]] = {}
        self._ran = False
        if model is not None:
            self._learn(model)

    def layer(self) -> tuple[nn.Module | None, str]:
        """The innermost running module: its root module, and its name there."""
        if not self._running:
            return None, LOSS if self._ran else OUTSIDE
        innermost = self._running[-1]
        if innermost in self._names:
            return self._names[innermost]
        return None, LOSS if self._ran and _size(self._running[0]) == 0 else type(innermost).__name__

    def spell(self, root: nn.Module | None, name: str) -> str:
        """The name for people: dotted as in ``named_modules()``, behind the class of any other model."""
        if root is None:
            return name
        if root is self.model:
            return name or "(model)"
        return f"{type(root).__name__}.{name}" if name else type(root).__name__

    def __enter__(self) -> ModuleStack:
        self._handles = (
            module_registry.register_module_forward_pre_hook(self._before),
            module_registry.register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
            # PyTorch does not remove this entry with the hook.
            module_registry._global_forward_hooks_with_kwargs.pop(handle.id, None)
        self._running.clear()
        self._entered = self._batch = _nobody  # a cycle would keep the batch, and what trains

    def _learn(self, root: nn.Module) -> None:
        for name, module in root.named_modules():
            self._names.setdefault(module, (root, name))

    def _own_call(self, module: nn.Module) -> bool:
        return not self._running or (self._given and module is self.model)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._own_call(module):
            size = _size(module)
            if size and module not in self._names:
                self._learn(module)
            if not self._given and size > self._size and torch._C._current_graph_task_id() == -1:
                self.model, self._size, self.call = module, size, None
            self._entered(module)
            if size:
                self._batch(given_tensors(args))
        self._running.append(module)

    # An always_call hook gets no keyword arguments when the forward raised.
    def _after(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        if module not in self._running:
            return
        while self._running.pop() is not module:
            pass
        if not self._own_call(module) or len(kwargs_and_output) < 2:
            return
        if _size(module) == 0:
            return
        self._ran = True
        kwargs = kwargs_and_output[0]
        self._batch(given_tensors(kwargs))
        if module is self.model and self.call is None:
            with self._unseen(), torch._C.DisableTorchFunction():  # an armed model's forward is not over yet
                self.call = Call.of(args, kwargs)


def _nobody(_: object) -> None:
    """Hear of nothing any more."""


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in own_parameters(module))


def given_tensors(batch: Any) -> list[torch.Tensor]:
    """The tensors that a model received, without those that another model computed for it."""
    return [tensor for tensor in tensors_in(batch) if tensor.grad_fn is None]
