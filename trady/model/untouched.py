"""One context in which a model may run, and after which it is as it was.

What trady runs for itself (traces, sweeps, the pass that a ledger is held against) must leave no mark. The pass is
undone, rather than run on a copy: many models cannot be copied (locks, closures over the model, tensors with a graph),
a copy that shares a closure would touch the original all the same, and a trace names weights by identity.
Undoing costs nothing where nothing happens: tensors are copied before the first write to them, and not else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from trady.model.batch import without_memory
from trady.model.python_state import PythonState, RandomState


@contextmanager
def untouched(*roots: Any, watches: bool = True) -> Iterator[CopyBeforeWrite]:
    """Context after which modules, and the batch they were called with, are bit for bit what they were.

    That is: parameters and buffers, their content, flags and gradients; the tensors that attributes hold; the flags
    ``training``; hooks; what :class:`trady.model.python_state.PythonState` finds in Python; the random generators of
    Python, NumPy and PyTorch; PyTorch's default type and grad mode. Inside, gradients are put aside.

    A tensor that is written to is copied first, once; nothing else takes memory. Not seen are writes that do not go
    through PyTorch (NumPy views, kernels called around its dispatcher).

    Args:
        roots: Modules and batches.
        watches: Whether all calls are watched, which costs time; else those inside of
            :meth:`CopyBeforeWrite.watching`, where it is known which may write to real tensors.

    Yields:
        What watches for writes; a backward pass runs inside of its :meth:`~CopyBeforeWrite.paused`.

    """
    with unseen():
        python, randomness = PythonState(roots), RandomState()
        dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
        tensors = [_TensorState(tensor) for tensor in python.tensors]
        writes = CopyBeforeWrite(python.tensors)
    try:
        with writes.watching() if watches else nullcontext():
            yield writes
    finally:
        with unseen():
            python.restore()
            for state in tensors:
                state.restore()
            writes.undo()
            randomness.restore()
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def switch_mode(model: nn.Module, training: bool) -> None:
    """Put a model in a mode by its own ``train()`` or ``eval()``, without arithmetic on its weights.

    Where a class has its own (a layer that merges an adapter into its weight in ``eval()``), it finds tensors without
    memory in the place of all parameters and buffers meanwhile: a trace asks for shapes only. If it looks at values,
    it gets the real ones. Where it puts another tensor of the same shape in a parameter's place, the parameter stays:
    a trace knows weights by identity. Inside of :func:`untouched` only, which takes it all back.
    """
    if not any(map(_has_own_switch, model.modules())):
        _call_switch(model, training)
        return
    with unseen():
        before = PythonState([model])
        places = list(_registered(model))
        twins = {id(tensor): _twin_of(tensor) for _, _, tensor in places}
        for tensors, name, tensor in places:
            tensors[name] = twins[id(tensor)]
    try:
        _call_switch(model, training)
    except Exception:
        with unseen():
            before.restore()
        _call_switch(model, training)
    with unseen():
        for tensors, name, tensor in places:
            new = tensors.get(name)
            if new is not None and new.shape == tensor.shape:
                tensors[name] = tensor


def _call_switch(model: nn.Module, training: bool) -> None:
    if training:
        model.train()
    else:
        model.eval()


def _has_own_switch(module: nn.Module) -> bool:
    plain, own = nn.Module, vars(module)
    kind = type(module)
    return kind.train is not plain.train or kind.eval is not plain.eval or "train" in own or "eval" in own


def _registered(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer, with where it is."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            yield from ((tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _twin_of(tensor: Tensor) -> Tensor:
    """A tensor of this shape, with these attributes, without memory."""
    twin = without_memory(tensor)
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
    vars(twin).update(vars(tensor))
    return twin


@contextmanager
def unseen() -> Iterator[None]:
    """Context that no mode of PyTorch sees: a trace or a simulation may be running outside."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def apart() -> Iterator[None]:
    """Context in which modes and hooks may be used, and those from outside see nothing of what is done."""
    autograd: Any = torch._C._autograd
    modes: list[Any] = []
    saving: list[Any] = []
    everywhere = [(found, dict(found)) for found in map(_global_hooks, _GLOBAL_HOOKS)]
    with _disable_current_modes():
        while _get_current_function_mode_stack():
            modes.append(_pop_mode())
        devices = [mode for mode in reversed(modes) if isinstance(mode, DeviceContext)]  # torch.set_default_device
        for mode in devices:
            _push_mode(mode)
        while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
            saving.append(top)
            autograd._pop_saved_tensors_default_hooks()
        for found, _ in everywhere:
            found.clear()
        try:
            yield
        finally:
            for found, hooks in everywhere:
                found.update(hooks)
            for pack, unpack in reversed(saving):
                autograd._push_saved_tensors_default_hooks(pack, unpack)
            for _ in devices:
                _pop_mode()
            for mode in reversed(modes):
                _push_mode(mode)


#: Hooks on every module there is.
_GLOBAL_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


def _global_hooks(name: str) -> dict[int, Any]:
    found: dict[int, Any] = getattr(nn.modules.module, f"_global_{name}")
    return found


class _TensorState:
    """What a tensor is beside its content: where that lies, its shape, flag and gradient."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._alias = tensor.detach()  # takes no memory
        self._is_leaf = tensor.is_leaf
        self._flag = tensor.requires_grad
        self._gradient = tensor.grad if self._is_leaf else None
        if self._gradient is not None:
            tensor.grad = None  # a backward pass would add to it

    def restore(self) -> None:
        if _place(self._tensor) != _place(self._alias):
            self._tensor.data = self._alias
        if not self._is_leaf:
            return
        if self._tensor.requires_grad != self._flag:
            self._tensor.requires_grad_(self._flag)
        if self._tensor.grad is not self._gradient:
            self._tensor.grad = self._gradient


def _place(tensor: Tensor) -> Any:
    """Where the elements of a tensor are; the same for all tensors that have no storage."""
    if tensor.layout is not torch.strided or _parts_of(tensor) is not None:
        return tensor.layout
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class CopyBeforeWrite(TorchDispatchMode):
    """Copies the memory of tensors before it is first written to, inside of :meth:`watching`.

    Args:
        tensors: Tensors whose memory is watched; those without memory need no watching.

    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._tensors = [tensor for tensor in tensors if not tensor.is_meta]
        self._storages = {s._cdata: s for tensor in self._tensors for s in _storages(tensor)}
        self._copies: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which writes are seen."""
        if not self._storages:
            yield
            return
        with self:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context for a backward pass, in which a mode would cost memory: sums of gradients are made out of place.

        Nothing is missed: gradients are put aside, and sections that are computed again were seen when they ran first.
        """
        if not self._storages:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(func):
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        for storage in _storages(tensor):
            key = storage._cdata
            if key in self._storages and key not in self._copies:
                self._copies[key] = storage.clone()

    def undo(self) -> None:
        """Put the content of all that was written back."""
        for key, copy in self._copies.items():
            storage = self._storages[key]
            if storage.nbytes() != copy.nbytes():
                storage.resize_(copy.nbytes())
            storage.copy_(copy)
        for tensor in self._tensors if self._copies else ():
            if not tensor.is_inference() and any(s._cdata in self._copies for s in _storages(tensor)):
                torch.autograd.graph.increment_version(tensor)  # who keeps a copy of it looks again
        self._copies.clear()


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor, also of one that is made of others."""
    parts = _parts_of(tensor)
    if parts is not None:
        return [storage for part in parts for storage in _storages(part)]
    if tensor.is_meta:
        return []
    try:
        return [tensor.untyped_storage()]
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return []


def _parts_of(tensor: Any) -> list[Tensor] | None:
    """The tensors that one is made of (torchao); ``None`` for a plain one."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return None
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [part for part in parts if isinstance(part, Tensor)]


#: Batch normalisation writes into these without saying so.
_STATISTICS = ("running_mean", "running_var")


@lru_cache(maxsize=4096)
def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operator of PyTorch writes to."""
    schema = getattr(function, "_schema", None)
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(() if schema is None else schema.arguments)
        if argument.name in _STATISTICS or (argument.alias_info is not None and argument.alias_info.is_write)
    )
