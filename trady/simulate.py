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
from trady.examine import Examined, examine, meta_batch, meta_twin, tensors_of
from trady.memory.live import LiveBytes
from trady.memory.timeline import Interval, Timeline
from trady.segments import Segment
from trady.standins import StandIns, mixed_to_meta
from trady.trace import as_arguments, real_device

#: What is computed anew, in training (True) and in evaluation mode (False).
Stretches = Mapping[bool, Sequence[Segment]]


def step_timeline(
    model: nn.Module,
    example: Any,
    *,
    layers: Sequence[str],
    head: Sequence[str],
    fuse: bool = True,
    stretches: Stretches | None = None,
    selection: Selection | None = None,
) -> Timeline:
    """Follow the live bytes of one training step in which one channel of each given layer trains.

    The step runs on a copy of the model that has shapes but no memory, so it costs neither. Ids and masks
    keep their values, since models look at them.

    Args:
        model: The model; only read.
        example: One batch.
        layers: Layers that will be drawn from.
        head: Modules that always train.
        fuse: As for :func:`trady.prepare`.
        stretches: What is computed anew in the backward pass (:func:`trady.examine.find_stretches`).
        selection: Channels that train, instead of one of each layer.

    """
    twin, batch = meta_twin(model), meta_batch(example)
    device = real_device(model, example) or torch.device("meta")
    with StandIns(device):
        examined = examine(twin, batch, head=head or None, fuse=fuse)
    chosen = selection or Selection({name: np.zeros(1, dtype=np.int64) for name in layers})
    return _timeline(twin, batch, examined, chosen, stretches or {}, device)


def _timeline(
    twin: nn.Module, batch: Any, examined: Examined, selection: Selection, stretches: Stretches, device: torch.device
) -> Timeline:
    armed = Armed(twin, examined, stretches)
    armed.select(selection)
    intervals: list[Interval] = []
    alive: dict[int, int] = {}
    live = LiveBytes()
    twin.train()
    try:
        live.register([*twin.parameters(), *twin.buffers()], "weights")
        live.register(tensors_of(batch), "inputs")
        live.register([armed.layers[name].compact for name in selection.channels], "compact parameters")
        with live:
            live.interval_peak()

            def cut(phase: str, layer: str) -> None:
                intervals.append(Interval(phase, layer, live.interval_peak()))

            def ran(layer: str) -> None:
                cut("forward" if torch._C._current_graph_task_id() == -1 else "recompute", layer)

            armed.interceptor.on_layer = ran
            armed.interceptor.prepare_call = mixed_to_meta
            armed.interceptor.on_call = lambda place: alive.setdefault(place, live.current)
            armed.on_gradient.append(lambda name, compact: cut("backward", name))
            args, kwargs = as_arguments(batch)
            with StandIns(device):
                output = twin(*args, **kwargs)
            alive[len(examined.plans[True].steps)] = live.current
            loss = surrogate_loss(output)
            del output
            if loss is not None:
                loss.backward()
            cut("end", "")
    finally:
        armed.disarm()
    head_bytes = sum(p.numel() * p.element_size() for p in examined.head_parameters.values())
    return Timeline(tuple(intervals), examined.table, head_bytes, alive)


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
