"""The ranking measured offline: every channel's gradient, in sweeps that each stay inside a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trady.armed import Armed
from trady.budget import Budget, Scope, below_least, parse_budget
from trady.channels import ChannelTable, Layer, Selection
from trady.errors import ModelError
from trady.examine import examine
from trady.plan import cost_of
from trady.ranking import LayerRanking, Metric, channel_scores, layer_score, structure_digest
from trady.simulate import step_timeline
from trady.trace import as_arguments


def rank(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Metric = "rgn",
    *,
    budget: str | Budget | None = None,
    head: str | Sequence[str] | None = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LayerRanking:
    """Measure which layers are worth updating: layer RGN of arXiv 2510.19675, section 3.

    For each layer ``RGN = sum_c ||dL/dW[:, c]||^2 / sum_c (C^W_c + C^A_c)``, with the squared norms of the
    stochastic gradients averaged over the batches. Nothing is updated.

    Args:
        model: The model, in the mode (train or eval) it is to be ranked in; normalisation stays fixed.
        batches: Pairs ``(inputs, targets)``, or mappings that the model itself computes a loss from.
        loss: ``loss(outputs, targets)``; ``None`` takes the model's own ``output.loss``.
        metric: ``rgn``, or ``norm`` for the gradient norm without reweighting.
        budget: What one sweep may take (any scope); the channels are then measured in as many sweeps over
            the batches as that needs, with the same result. ``None`` measures all at once.
        head: See :func:`trady.prepare`.
        seed: Seed of dropout and other randomness, the same for every sweep.
        progress: Called with (steps done, steps in all).

    Returns:
        The ranking, with the mean RGN of every channel.

    Raises:
        BudgetError: Not a single channel fits in the budget.
        ModelError: There is no batch, or no loss.

    """
    data = list(batches)
    if not data:
        raise ModelError("there is no batch to rank on; pass at least one (inputs, targets) pair")
    inputs = _split(data[0])[0]
    examined = examine(model, inputs, head=head)
    table = examined.table
    selections = list(_sweeps(table, _fits(model, inputs, table, examined.head, budget)))
    squared = {layer.name: np.zeros(layer.channels) for layer in table}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    armed = Armed(model, examined)
    now: dict[str, Tensor] = {}

    def arrived(name: str, compact: nn.Parameter) -> None:
        if compact.grad is not None:
            now[name] = compact.grad.detach().flatten(1).double().square().sum(1)
            compact.grad = None

    armed.on_gradient.append(arrived)
    devices = sorted({t.device for t in model.parameters() if t.device.type == "cuda"}, key=str)
    try:
        for number, selection in enumerate(selections):
            armed.select(selection)
            for index, batch in enumerate(data):
                now.clear()
                with torch.random.fork_rng(devices=devices):
                    torch.manual_seed(seed + index)
                    _loss(model, batch, loss).backward()
                for parameter in examined.head_parameters.values():
                    parameter.grad = None
                for name, norms in now.items():
                    squared[name][selection[name]] += norms.cpu().numpy() / len(data)
                if progress is not None:
                    progress(number * len(data) + index + 1, len(selections) * len(data))
    finally:
        armed.select(Selection())
        armed.disarm()
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
    return LayerRanking(
        scores={layer.name: layer_score(squared[layer.name], layer, metric) for layer in table},
        metric=metric,
        source="measured",
        structure=structure_digest(table),
        channels={layer.name: tuple(channel_scores(squared[layer.name], layer, metric).tolist()) for layer in table},
        batches=len(data),
        elements={layer.name: layer.elements for layer in table},
    )


def _split(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch; a mapping is all input."""
    if hasattr(batch, "keys"):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ModelError(
        f"a batch to rank on is a pair (inputs, targets) or a mapping with labels; this one is a {type(batch).__name__}"
    )


def _loss(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None) -> Tensor:
    inputs, targets = _split(batch)
    args, kwargs = as_arguments(inputs)
    output = model(*args, **kwargs)
    if loss is not None:
        return loss(output, targets)
    own = getattr(output, "loss", None)
    if not isinstance(own, Tensor):
        raise ModelError("the model returns no loss of its own; pass loss=, such as torch.nn.functional.cross_entropy")
    return own


def _fits(
    model: nn.Module, inputs: Any, table: ChannelTable, head: Sequence[str], budget: str | Budget | None
) -> Callable[[Selection], bool]:
    if budget is None:
        return lambda selection: True
    asked = parse_budget(budget)
    if asked.scope is Scope.PEAK:
        timeline = step_timeline(model, inputs, layers=table.names, head=head)
        least = timeline.least_bytes
        amount = timeline.predicted_peak
    else:
        update = asked.scope is Scope.UPDATE
        least = min(_amount(table, layer, update) for layer in table)

        def amount(selection: Selection, state_copies: int = 0) -> int:
            cost = cost_of(table, selection, state_copies)
            return cost.update_bytes if update else cost.elements

    if asked.amount < least:
        raise below_least(asked, least)
    return lambda selection: amount(selection) <= asked.amount


def _amount(table: ChannelTable, layer: Layer, update: bool) -> int:
    cost = cost_of(table, Selection({layer.name: np.zeros(1, dtype=np.int64)}))
    return cost.update_bytes if update else cost.elements


def _sweeps(table: ChannelTable, fits: Callable[[Selection], bool]) -> Iterator[Selection]:
    """Cut all channels, in order of execution, into selections that fit, each as long as it can be."""
    current: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for layer in table:
        start = 0
        while start < layer.channels:
            count = _most(layer.channels - start, lambda n: fits(_with(current, layer, start, n)))  # noqa: B023
            if count:
                current = dict(_with(current, layer, start, count).channels)
                start += count
            elif current:
                yield Selection(current)
                current = {}
            else:
                raise ModelError(f"a channel of {layer.name} alone does not fit in the budget")
            if start < layer.channels and current:
                yield Selection(current)
                current = {}
    if current:
        yield Selection(current)


def _with(current: dict[str, Any], layer: Layer, start: int, count: int) -> Selection:
    return Selection({**current, layer.name: np.arange(start, start + count)})


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits, or 0; what fits stays fitting with less."""
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
