"""A training step without memory or arithmetic: the timeline of live bytes, taken on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from trady.armed import Armed
from trady.channels import Selection
from trady.examine import examine, meta_batch, meta_twin, tensors_of
from trady.labels import asking_for_ourselves
from trady.memory.live import LiveBytes, Storage
from trady.memory.timeline import Interval, Timeline
from trady.segments import Segment
from trady.standins import StandIns, mixed_to_meta
from trady.trace import as_arguments, kept_mode, real_device

#: What is computed anew, in training (True) and in evaluation mode (False).
Stretches = Mapping[bool, Sequence[Segment]]


class Simulator:
    """Follows the live bytes of training steps of one model on one batch, without memory or arithmetic.

    The steps run on a copy of the model that has shapes but no memory. Ids and masks keep their values,
    since models look at them.

    Args:
        model: The model; only read.
        example: One batch.
        head: Modules that always train.
        fuse: As for :func:`trady.prepare`.
        fidelity: As for :func:`trady.prepare`.
        waiting_bytes: Bytes of a larger batch that wait while the model works on this part of it.

    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        head: Sequence[str],
        fuse: bool = True,
        fidelity: str = "exact",
        waiting_bytes: int = 0,
    ) -> None:
        self._fidelity = fidelity
        self._waiting = torch.empty(waiting_bytes, dtype=torch.uint8, device="meta")
        self._twin, self._batch = meta_twin(model), meta_batch(example)
        self._device = real_device(model, example) or torch.device("meta")
        with StandIns(self._device):
            self._examined = examine(self._twin, self._batch, head=head or None, fuse=fuse, modes=(True,))

    def inference_bytes(self) -> tuple[int, int]:
        """Simulate one inference pass of the untouched model.

        Returns:
            Bytes of weights, buffers and batch; and how far the peak is above them.

        """
        live = LiveBytes()
        resident = [*self._twin.parameters(), *self._twin.buffers(), *tensors_of(self._batch)]
        args, kwargs = as_arguments(self._batch)
        with kept_mode(self._twin, False):
            live.register(resident)
            before = live.current
            with StandIns(self._device), torch.no_grad(), live:
                self._twin(*args, **kwargs)
        return before, live.highest()[0] - before

    def timeline(
        self,
        *,
        layers: Sequence[str] = (),
        stretches: Stretches | None = None,
        selection: Selection | None = None,
        parts: bool = False,
        update_forms: int | None = None,
    ) -> Timeline:
        """Run one step in which one channel of each given layer trains.

        Args:
            layers: Layers that will be drawn from.
            stretches: What is computed anew in the backward pass (:func:`trady.examine.find_stretches`).
            selection: Channels that train, instead of one of each layer.
            parts: Also say what the peak is made of.
            update_forms: Tensors of a compact gradient's size that an optimizer needs to use it up when it arrives
                (:mod:`trady.optim`); ``None`` where gradients stay until the step ends.

        """
        if selection is None:
            selection = Selection({name: np.zeros(1, dtype=np.int64) for name in layers})
        armed = Armed(self._twin, self._examined, stretches or {}, self._fidelity)
        try:
            return self._follow(armed, selection, parts, update_forms)
        finally:
            armed.disarm()
            for parameter in self._twin.parameters():
                parameter.grad = None

    def _follow(self, armed: Armed, selection: Selection, parts: bool, update_forms: int | None) -> Timeline:
        armed.select(selection)
        intervals: list[Interval] = []
        live = LiveBytes()
        made_of: dict[str, int] = {}
        self._twin.train()
        live.register([*self._twin.parameters(), *self._twin.buffers()], "weights")
        live.register([*tensors_of(self._batch), self._waiting], "inputs")
        compact = [armed.layers[name].compact for name in selection.channels]
        live.register(compact, "compact parameters")

        def cut(phase: str, layer: str) -> None:
            intervals.append(Interval(phase, layer, live.interval_peak()))

        def ran(layer: str) -> None:
            cut("forward" if torch._C._current_graph_task_id() == -1 else "recompute", layer)

        def arrived(layer: str, compact: nn.Parameter) -> None:
            if update_forms is not None and compact.grad is not None:
                needed = [torch.empty_like(compact.grad) for _ in range(update_forms)]
                del needed
                compact.grad = None
            cut("backward", layer)

        armed.interceptor.on_layer = ran
        armed.interceptor.prepare_call = mixed_to_meta
        armed.on_gradient.append(arrived)
        with live:
            live.interval_peak()
            kept = self._forward_and_backward(live)
            cut("end", "")
            if parts:
                if self._waiting.numel():  # the next part of the batch finds the gradients of this one
                    kept += self._forward_and_backward(live)
                live.register([p.grad for p in compact if p.grad is not None], "compact gradients")
                live.register([p.grad for p in self._twin.parameters() if p.grad is not None], "gradients")
                made_of = _parts(live, kept)
        head_bytes = sum(p.numel() * p.element_size() for p in self._examined.head_parameters.values())
        return Timeline(tuple(intervals), self._examined.table, head_bytes, made_of, update_forms is not None)

    def _forward_and_backward(self, live: LiveBytes) -> list[Storage]:
        """Run one pass; return what was alive in its middle."""
        args, kwargs = as_arguments(self._batch)
        with StandIns(self._device):
            output = self._twin(*args, **kwargs)
        loss = surrogate_loss(output)
        del output
        kept = [storage for storage in live.log if storage.death is None]
        if loss is not None:
            with StandIns(self._device):
                _backward(loss)
        return kept


def _backward(loss: Tensor) -> None:
    """Run the backward pass with function modes on, for sections that a model recomputes in it.

    ``loss.backward()`` is itself handled by the modes, which are off meanwhile.
    """
    token = asking_for_ourselves.set(True)
    try:
        run = torch.autograd.graph._engine_run_backward
        run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        asking_for_ourselves.reset(token)


def _parts(live: LiveBytes, kept: Sequence[Storage]) -> dict[str, int]:
    """What the peak is made of; saved is what is alive between forward and backward."""
    _, moment = live.highest()
    saved = {id(storage) for storage in kept}
    found: dict[str, int] = {}
    for storage in live.log:
        if storage.alive_at(moment):
            part = storage.category or ("saved activations" if id(storage) in saved else "temporaries")
            found[part] = found.get(part, 0) + storage.nbytes
    return found


def surrogate_loss(output: Any) -> Tensor | None:
    """A scalar that reaches every output as a cross-entropy would; the model's own loss where it gives one."""
    loss = getattr(output, "loss", None) if not isinstance(output, Tensor) else None
    if isinstance(loss, Tensor):
        return loss
    tree = dict(output) if hasattr(output, "keys") else output
    floats = [t for t in tree_iter(tree) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    total: Tensor | None = None
    for tensor in floats:
        term = torch.log_softmax(tensor, -1).mean() if tensor.dim() else tensor
        total = term if total is None else total + term
    return total
