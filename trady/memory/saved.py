"""What autograd keeps between forward and backward, and which operation saved it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from trady.ops.context import current_operation, saved_kind

HOOKS_DISABLED = "saved tensors hooks were disabled in the step: what was saved then is not listed"


@dataclass(frozen=True)
class Saved:
    """What one operation of one layer keeps for backward.

    Attributes:
        layer: Innermost module that ran, as in ``named_modules()``; ``(model)``, ``(loss)``, ``(outside)``.
        operation: What saved it, e.g. ``conv2d``, or an intercepted ``conv2d+batch_norm+relu``.
        kind: ``activations``, or as a lean operation labels it: ``channels``, ``bits``, ``indices``.
        bytes: Bytes of storage; a storage saved twice belongs to its first saver.
        tensors: Number of storages.
    """

    layer: str
    operation: str
    kind: str
    bytes: int
    tensors: int


class _Packed(NamedTuple):
    tensor: torch.Tensor
    version: int


class OperationNames(TorchFunctionMode):
    """Remembers the torch function that is running; passes every call through."""

    def __init__(self) -> None:
        super().__init__()
        self._function: Any = None

    def name(self, saver: Any) -> str:
        """Name of the running operation; ``saver`` is the frame that a pack hook was called from."""
        labelled = current_operation.get()
        if labelled is not None:
            return labelled
        if saver is not None and saver.f_code.co_name == "apply" and "cls" in saver.f_locals:
            return str(saver.f_locals["cls"].__name__)  # a custom autograd Function
        name = getattr(self._function, "__name__", None)
        if name is None:
            return "(operation)"
        return str(name.strip("_") if name.startswith("__") else name)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Remember the function and run it."""
        before, self._function = self._function, func
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._function = before


@contextmanager
def saved_tensors(see: Callable[[torch.Tensor, str, Any], object]) -> Iterator[list[str]]:
    """Call ``see(tensor, kind, frame)`` with every tensor that a forward saves, inside ``with``.

    What is saved during a backward pass (recomputation) is not reported, nor what an inner pair of hooks takes
    over: a checkpointed region reports the inputs it keeps.

    Yields:
        Remarks on what could not be seen, filled in as it happens.
    """
    remarks: list[str] = []

    def pack(tensor: torch.Tensor) -> _Packed:
        if torch._C._current_graph_task_id() == -1:
            see(tensor, saved_kind(tensor) or "activations", sys._getframe(1))
        # Detached, or an operation that saves its own output would never be freed.
        return _Packed(tensor.detach(), tensor._version)

    def unpack(packed: _Packed) -> torch.Tensor:
        # With hooks, autograd does not check versions itself.
        if packed.tensor._version != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(packed.tensor.shape)} is at version "
                f"{packed.tensor._version}, expected version {packed.version} instead"
            )
        return packed.tensor

    hooks = saved_tensors_hooks(pack, unpack)
    try:
        hooks.__enter__()
    except RuntimeError:
        remarks.append(HOOKS_DISABLED)
        yield remarks
        return
    gone: list[saved_tensors_hooks] = []
    try:
        with _hooks_may_be_disabled(hooks, remarks, gone):
            yield remarks
    finally:
        if not gone:
            hooks.__exit__()


@contextmanager
def _hooks_may_be_disabled(
    hooks: saved_tensors_hooks, remarks: list[str], gone: list[saved_tensors_hooks]
) -> Iterator[None]:
    """Let the step disable hooks, as torch.func does; PyTorch refuses that while there are some."""
    autograd: Any = torch._C._autograd
    plain = autograd._saved_tensors_hooks_disable

    def disable(message: str, fail_if_non_empty: bool = False) -> None:
        if HOOKS_DISABLED not in remarks:
            remarks.append(HOOKS_DISABLED)
        try:
            plain(message, False)
        except TypeError:  # PyTorch 2.6 and 2.7 lack this argument, so the hooks are removed for good
            if not gone:
                hooks.__exit__()
                gone.append(hooks)
            plain(message)

    autograd._saved_tensors_hooks_disable = disable
    try:
        yield
    finally:
        autograd._saved_tensors_hooks_disable = plain
