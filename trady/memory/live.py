"""Live tensor memory: every storage is counted once, from when it is seen until it is freed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.autograd import graph
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from trady.model.structure import components
from trady.ops.context import followed_storages

Shrink = Callable[[torch.UntypedStorage, int], None]

#: PyTorch wraps ``__torch_dispatch__`` in frames of its own; they are not the caller.
_WRAPPERS = ("torch/_dynamo/eval_frame.py", "torch/_compile.py")
_ENGINE = graph._engine_run_backward.__code__


class Storage:
    """One storage while it was alive, or one size of it if it was resized in place.

    Attributes:
        nbytes: Its size in bytes.
        device: Type of the device it is on, e.g. ``cpu``.
        category: What it was first registered as; ``None`` for what operations made.
        saved: Whether autograd kept it between forward and backward.
        birth: The event that brought it to life; 0 for what was there from the start.
        death: The event that ended it; ``None`` while it lives.
    """

    __slots__ = ("birth", "category", "death", "device", "nbytes", "saved")

    def __init__(self, nbytes: int, device: str, birth: int) -> None:
        self.nbytes = nbytes
        self.device = device
        self.birth = birth
        self.death: int | None = None
        self.category: str | None = None
        self.saved = False

    def alive_at(self, event: int) -> bool:
        """Whether it was alive right after this event."""
        return self.birth <= event and (self.death is None or self.death > event)


class _Reference(weakref.ref[torch.UntypedStorage]):
    """A weak reference that knows whose storage it was."""

    __slots__ = ("key", "storage")
    key: int
    storage: Storage


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, inside ``with LiveBytes() as live``.

    A storage is counted from the first operation that reads or writes it (or from
    :meth:`register`) until PyTorch frees it, once however many tensors share it. Meta and
    fake tensors count as what they would take. Workspaces that a kernel allocates and frees by itself are not seen.

    Watching changes one thing, which is corrected here: under a dispatch mode, autograd adds up the gradients of a
    tensor with several readers out of place, and otherwise in place. The extra copy is not counted.

    Args:
        on_peak: Called with the new highest bytes each time there are more than ever before.

    Attributes:
        current: Bytes alive now, all devices together.
        peak: The most bytes that were alive at one time.
        log: Every storage seen, in order of birth.
    """

    supports_higher_order_operators = True

    def __init__(self, on_peak: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.log: list[Storage] = []
        self._on_peak = on_peak
        self._interval_peak = 0
        self._event = 0
        self._references: dict[int, _Reference] = {}
        self._left_out: dict[int, _Reference] = {}
        self._blind = 0
        # The storage that plain autograd would have written a sum of gradients into, if it is the next to be freed.
        self._handover: Storage | None = None
        self._unobserved: set[int] = set()
        self._resize: list[Shrink] = []

    def interval_peak(self) -> int:
        """The most bytes alive at one time since the last call; the next interval starts here."""
        self._settle(None)
        highest, self._interval_peak = self._interval_peak, self.current
        return highest

    def register(
        self,
        tensors: torch.Tensor | Iterable[torch.Tensor],
        category: str | None = None,
        *,
        since_start: bool = False,
    ) -> list[Storage]:
        """Count tensors that exist already, and say what they are.

        Args:
            tensors: Tensors of any kind; those that share a storage count once.
            category: What they are, e.g. ``weights``. A storage keeps its first category.
            since_start: Count those not seen before as alive from the very beginning.

        Returns:
            Their storages, each once.
        """
        found: dict[int, Storage] = {}
        for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
            with torch._C.DisableTorchFunction():
                storages = list(_storages(tensor))
            for untyped in storages:
                known = untyped._cdata in self._references
                storage = self._follow(untyped)
                if since_start and not known:
                    # It was there from the start, so everything counted so far grows by its size.
                    storage.birth = 0
                    self.peak = max(self.peak + storage.nbytes, self.current)
                    self._interval_peak = max(self._interval_peak + storage.nbytes, self.current)
                if storage.category is None:
                    storage.category = category
                found[id(storage)] = storage
        return list(found.values())

    def highest(self, select: Callable[[Storage], bool] | None = None) -> tuple[int, int]:
        """The most bytes that some storages took at one time, and the event after which they did.

        Args:
            select: Which storages to count; all by default. :meth:`Storage.alive_at` tells which of them were alive
                at the event that is returned.
        """
        self._settle(None)
        change = [0] * (self._event + 1)
        for storage in self.log:
            if select is None or select(storage):
                change[storage.birth] += storage.nbytes
                if storage.death is not None:
                    change[storage.death] -= storage.nbytes
        total = highest = at = 0
        for event, difference in enumerate(change):
            total += difference
            if total > highest and event not in self._unobserved:
                highest, at = total, event
        return highest, at

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Do not count what is made inside the context."""
        self._blind += 1
        try:
            yield
        finally:
            self._blind -= 1

    def drop(self, tensor: torch.Tensor) -> None:
        """Stop counting a tensor: something else takes its place from now on."""
        for untyped in _storages(tensor):
            reference = self._references.pop(untyped._cdata, None)
            if reference is not None:
                self._ended(reference.storage)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor: it is a fake tensor for one that is counted."""
        for untyped in _storages(tensor):
            reference = _Reference(untyped, self._left)
            reference.key, reference.storage = untyped._cdata, Storage(untyped.nbytes(), untyped.device.type, 0)
            self._left_out[reference.key] = reference

    def forget(self) -> None:
        """Stop following; figures and log stay as they are."""
        self._settle(None)
        self._references.clear()

    def __enter__(self) -> LiveBytes:
        # FSDP and others free storages with ``resize_``, which no dispatch mode sees: so it is wrapped.
        plain: Shrink = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            plain(storage, size)
            if storage._cdata in self._references:
                self._follow(storage)

        self._resize.append(plain)
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        followed_storages.append(self._references)
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        followed_storages[:] = [followed for followed in followed_storages if followed is not self._references]
        torch.UntypedStorage.resize_ = self._resize.pop()  # type: ignore[method-assign, assignment]
        self._settle(None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count what it read and what it made."""
        if types and any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the subclass goes first; its inner operations come back here
        result = func(*args, **kwargs) if kwargs else func(*args)
        if not self._blind:
            with torch._C.DisableTorchFunction():
                self._see(args)
                if kwargs:
                    self._see(kwargs)
                if func is torch.ops.aten.add.Tensor and not kwargs and _sums_gradients():
                    self._see_sum(args[0], result)
                else:
                    self._see(result)
        return result

    def _see(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            kind = type(value)
            if kind is torch.Tensor or kind is Parameter:
                try:
                    self._follow(value.untyped_storage())
                    return
                except (NotImplementedError, RuntimeError):
                    pass
            for storage in _storages(value):
                self._follow(storage)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._see(item)
        elif isinstance(value, dict):
            for item in value.values():
                self._see(item)

    def _see_sum(self, held: torch.Tensor, total: torch.Tensor) -> None:
        into = [self._follow(storage) for storage in _storages(held)]
        made = list(_storages(total))
        fresh = len(into) == len(made) == 1 and made[0]._cdata not in self._references
        if fresh and into[0].nbytes == made[0].nbytes():
            self._follow(made[0], observe=False)
            self._handover = into[0]
        else:
            self._see(total)

    def _follow(self, untyped: torch.UntypedStorage, *, observe: bool = True) -> Storage:
        key = untyped._cdata
        if key in self._left_out:
            return self._left_out[key].storage
        reference = self._references.get(key)
        if reference is None:
            reference = _Reference(untyped, self._died)
            reference.key = key
            self._references[key] = reference
            reference.storage = self._born(untyped.nbytes(), untyped.device.type, observe)
        elif reference.storage.nbytes != untyped.nbytes():
            before = reference.storage
            self._ended(before)
            after = reference.storage = self._born(untyped.nbytes(), before.device, observe)
            after.category, after.saved = before.category, before.saved
        return reference.storage

    def _born(self, nbytes: int, device: str, observe: bool) -> Storage:
        self._settle(None)
        self._event += 1
        storage = Storage(nbytes, device, self._event)
        self.log.append(storage)
        self.current += nbytes
        if observe:
            self._observe()
        else:
            self._unobserved.add(self._event)
        return storage

    def _died(self, reference: _Reference) -> None:
        if self._references.get(reference.key) is reference:
            del self._references[reference.key]
            self._ended(reference.storage)

    def _left(self, reference: _Reference) -> None:
        if self._left_out.get(reference.key) is reference:
            del self._left_out[reference.key]

    def _ended(self, storage: Storage) -> None:
        self._settle(storage)
        self._event += 1
        storage.death = self._event
        self.current -= storage.nbytes

    def _observe(self) -> None:
        if self.current > self._interval_peak:
            self._interval_peak = self.current
        if self.current > self.peak:
            self.peak = self.current
            if self._on_peak is not None:
                self._on_peak(self.peak)

    def _settle(self, dying: Storage | None) -> None:
        if self._handover is not None:
            if dying is not self._handover:  # still held elsewhere: the sum did take new memory
                self._unobserved.discard(self._event)
                self._observe()
            self._handover = None


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages of a tensor of any kind; none for one that hides them."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):
                yield from _storages(inner)
    else:
        for part in components(tensor):
            try:
                yield part.untyped_storage()
            except (NotImplementedError, RuntimeError):
                return


def _sums_gradients() -> bool:
    """Whether the running addition is the autograd engine's own sum of gradients."""
    if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    # On the backward thread of a device there is no Python frame below.
    return frame is None or frame.f_code is _ENGINE
