"""Gradients of several processes: averaged once a step, in an order that is the same in every process.

What DistributedDataParallel does for a model, done for the channels that train and the head. The order is that of the
channel table, never that in which gradients arrive: other batches, or a recomputed segment, may bring them in
another one. At the end of a backward pass all go together, in a few buffers. An optimizer that updates inside the
backward pass cannot wait for that: its gradients are averaged one by one, each when those before it in the order have
been.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trady.interception.armed import Armed
from trady.process.ranks import Traffic, agree, average_, average_gradients_, processes
from trady.tuner.data_parallel import Wrappers

Part = TypeVar("Part")


class Reduction:
    """Averages what trains.

    Args:
        armed: The armed model.
        head: Parameters of the head, by name.
        facts: What the processes must have in common, by name, and what may differ; asked for at the first reduction
            of a draw, with whether it is the first of all.
        inside: Identities of the compact parameters that are updated inside the backward pass.
        averaged: Called with (layer, compact parameter) once its gradient is the mean over the processes.

    Attributes:
        traffic: What was averaged since the model was prepared.
    """

    def __init__(
        self,
        armed: Armed,
        head: Mapping[str, nn.Parameter],
        facts: Callable[[bool], tuple[Mapping[str, str], Mapping[str, str]]],
        inside: Callable[[], set[int]],
        averaged: Callable[[str, nn.Parameter], None],
    ) -> None:
        self._armed, self._head = armed, dict(head)
        self._facts, self._inside, self._averaged = facts, inside, averaged
        self.traffic = Traffic()
        self._wrappers = Wrappers(armed.model, has_head=bool(head))
        self._handles: list[Any] = []
        #: How many contexts are open in which gradients stay where they are.
        self._apart = 0
        #: Whether a wrapper's last forward pass, or nobody, wants the gradients of its backward pass averaged.
        self._wanted = True
        #: Whether gradients have arrived that are not averaged yet.
        self._waits = False
        #: The backward pass at whose end they are averaged, and the layers whose turn has come or passed in it.
        self._pass = -1
        self._order: Sequence[str] = ()
        self._arrived: set[str] = set()
        self._turn = 0
        #: The channels that were drawn when the processes were last compared.
        self._checked: object = None
        armed.on_forward.append(self._before_forward)

    # -- what a loop says ----------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which gradients add up in each process, without being averaged."""
        self._apart += 1
        try:
            yield
        finally:
            self._apart -= 1

    def but_for_the_last(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Yield the parts of a batch; the gradients of all but the last one stay where they are."""
        waiting = iter(parts)
        part = next(waiting, None)
        while part is not None:
            following = next(waiting, None)
            with nullcontext() if following is None else self.no_sync():
                yield part
            part = following

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or processes() == 1:
            return
        if not self._handles:
            self._watch_head()
        self._wanted = self._wrappers.wants_gradients()

    def _watch_head(self) -> None:
        known = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            if (mine := known()) is not None:
                mine._notice()

        for parameter in self._head.values():
            see: Any = parameter.register_post_accumulate_grad_hook
            self._handles.append(see(arrived))

    # -- gradients -----------------------------------------------------------------------------------

    def arrived(self, layer: str) -> None:
        """Take in that the gradient of a layer's channels has arrived."""
        self._notice()
        if self._syncs and self._order:
            self._arrived.add(layer)
            self._average_in_turn()

    @property
    def _syncs(self) -> bool:
        return self._wanted and not self._apart

    def _notice(self) -> None:
        self._waits = True
        task = torch._C._current_graph_task_id()
        if not self._syncs or task == self._pass:
            return
        self._pass = task
        self._arrived.clear()
        self._turn = 0
        self._order = self._in_backward()
        engine: Any = torch.autograd.Variable._execution_engine
        known = weakref.WeakMethod(self._end)
        engine.queue_callback(lambda: None if (end := known()) is None else end())

    def _in_backward(self) -> list[str]:
        """Layers that are updated inside the backward pass, in the order in which it comes through the table."""
        inside = self._inside()
        return [name for name in reversed(self._layers()) if id(self._armed.layers[name].compact) in inside]

    def _layers(self) -> list[str]:
        """Layers with channels that train, in the order of the table."""
        found = self._armed.layers
        return [n for n, each in found.items() if each.selected is not None and each.compact.requires_grad]

    def _average_in_turn(self, *, rest: bool = False) -> list[str]:
        """Average what is updated inside the backward pass as far as it has arrived in order; return what was not.

        Args:
            rest: Also what has not arrived: in another process it may have.
        """
        missing = []
        while self._turn < len(self._order):
            name = self._order[self._turn]
            if name not in self._arrived and not rest:
                break
            self._turn += 1
            compact = self._armed.layers[name].compact
            self._check()
            if compact.grad is None:
                missing.append(name)
            gradient = torch.zeros_like(compact) if compact.grad is None else compact.grad
            self.traffic += average_([gradient], self._wrappers.group)
            compact.grad = gradient
            if name not in missing:
                self._averaged(name, compact)
        return missing

    def _end(self) -> None:
        """End a backward pass."""
        self._pass = -1
        if self._syncs:
            self.reduce()

    def reduce(self) -> None:
        """Average what has arrived and was not averaged yet; called by every process or by none."""
        if not self._waits or processes() == 1:
            return
        self._waits = False
        self._check()
        missing = self._average_in_turn(rest=True)
        inside, self._order = list(self._order), ()
        layers = [name for name in self._layers() if name not in inside]
        compact = {name: self._armed.layers[name].compact for name in (*layers, *missing)}
        rest = [*(compact[name] for name in layers), *(p for _, p in self._trained_head())]
        late = [compact[name] for name in missing]
        self.traffic += average_gradients_(rest, self._wrappers.group, averaged=late)
        for name, parameter in compact.items():
            if parameter.grad is not None:
                self._averaged(name, parameter)

    def _trained_head(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._head.items() if p.requires_grad]

    def _check(self) -> None:
        """Compare with the other processes, once a draw."""
        drawn = self._armed.selection
        if self._checked is not drawn:
            order = [*self._layers(), *(name for name, _ in self._trained_head())]
            facts, beside = self._facts(self._checked is None)
            agree({**facts, "the order of the gradients": ", ".join(order)}, self._wrappers.group, beside=beside)
            self._checked = drawn

    def end(self) -> None:
        """Let go of the head, and give wrappers what they had."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._wrappers.put_back()
