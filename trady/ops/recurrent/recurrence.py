"""The steps of a recurrent layer in one node of the graph, and their gradient, for the selected channels.

The products with the inputs (``gates``) are made beforehand, for all steps at once. Kept for the backward pass are the
gates, the cell states of an LSTM, and the selected channels of the hidden states. There, all that does not depend on
later steps is computed for many steps at once. That leaves one product a step, and the weight gradient

    dL/dW[:, c] = Σ_t dL/dproducts_t^T h_(t-1)[c]

is a single product for all steps.
"""

# T steps, S sequences, H features of the hidden state, D cells, Q gates, n selected channels of H: gates [T, S, Q] (or
# as trady.ops.recurrent.steps.Steps says), states [S, H], W [Q, H], dL/dproducts [T, S, Q].

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from trady.ops.context import label_saved, without_autocast
from trady.ops.gates import Gates
from trady.ops.layer import LayerCall, add_weight_gradient
from trady.ops.once import once_differentiable
from trady.ops.operators import Linear
from trady.ops.recurrent.cells import CELLS, Weights
from trady.ops.recurrent.steps import Steps
from trady.ops.selected import SelectedChannels


@dataclass(frozen=True)
class RecurrentOptions:
    """How the steps are computed.

    Attributes:
        steps: Their order.
        selected: The channels of the hidden states that train; ``None`` when none does.
        overwrite: Whether the memory of the gates may be used, because nobody else reads them.
    """

    steps: Steps
    selected: SelectedChannels | None = None
    overwrite: bool = False


def recurrence(
    gates: Tensor,
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    steps: Steps,
) -> tuple[Tensor, ...]:
    """Compute the steps of a recurrent layer, as a torch function that modes see as one call.

    Args:
        gates: The products with the inputs, [..., gates]; see :class:`trady.ops.recurrent.steps.Steps` for the rest.
        states: Hidden state, and of an LSTM cell state, before the first step: [sequences, features].
        weight: What hidden states are multiplied by, [gates, features].
        bias: What is added to that.
        projection: Of an LSTM with projections, [features, cells].
        steps: The kind of cell, and the order of the steps.

    Returns:
        The hidden states [..., features], and the states after the last step.

    """
    tensors = [gates, *states, weight, *(t for t in (bias, projection) if t is not None)]
    if has_torch_function(tensors):
        made: tuple[Tensor, ...] = handle_torch_function(
            recurrence, tensors, gates, states, weight, bias, projection, steps
        )
        return made
    return recurrent(gates, states, None, RecurrentOptions(steps), weight, bias, projection)


def recurrent(
    gates: Tensor,
    states: Sequence[Tensor],
    compact: Tensor | None,
    options: RecurrentOptions,
    weight: Tensor,
    bias: Tensor | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute :func:`recurrence`.

    Its gradient reaches ``gates``, ``states``, the weights that require one, and for the selected channels
    ``compact``, a leaf as in :func:`trady.ops.layer.layer`.
    """
    starts = [state.to(gates.dtype) for state in states]
    compact = compact if options.selected is not None and compact is not None and compact.requires_grad else None
    inputs = (gates, *starts, compact, weight, bias, projection)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return tuple(_Recurrent.apply(options, compact, weight, bias, projection, gates, *starts))
    with torch.no_grad():
        return _forward(gates, starts, options, Weights(weight, bias, projection))[0]


def _forward(
    gates: Tensor,
    starts: Sequence[Tensor],
    options: RecurrentOptions,
    weights: Weights,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the results, and what the backward pass reads."""
    steps = options.steps
    with without_autocast(gates):
        gates = gates.detach() if options.overwrite else gates.clone(memory_format=torch.contiguous_format)
        cell = CELLS[steps.cell][0](steps, gates, starts, weights.to(gates.dtype))
        out = gates.new_empty((*gates.shape[:-1], starts[0].shape[-1]))
        made = steps.views(out)
        for t in _computed(steps.order(len(made)), gates):
            cell.step(t, steps.before(made, starts[0], t), made[t])
        return (out, steps.last(made), *cell.ends()), cell.kept(out)


def _computed(steps: range, x: Tensor) -> range:
    """The steps to compute: on fake tensors one step shows what each of them takes."""
    return steps[:1] if x.is_meta else steps


def states_before(out: Tensor, start: Tensor, steps: Steps, index: Tensor | None = None) -> Tensor:
    """The hidden states before all steps, or some of their channels: what the weight was multiplied by."""
    made = steps.views(out)
    taken = torch.empty_like(out) if index is None else out.new_empty((*out.shape[:-1], len(index)))
    targets = steps.views(taken)
    for t in _computed(range(len(targets)), out):
        target, before = targets[t], steps.before(made, start, t)
        if index is None:
            target.copy_(before)
        else:
            torch.index_select(before, 1, index, out=target)
    return taken


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: RecurrentOptions,
        compact: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        projection: Tensor | None,
        gates: Tensor,
        *starts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights = Weights(weight, bias, projection)
        made, kept = _forward(gates, starts, options, weights)
        inputs, selected = None, options.selected
        if compact is not None and selected is not None:
            inputs = label_saved(states_before(made[0], starts[0], options.steps, selected.index), "channels")
        elif weight.requires_grad:
            inputs = states_before(made[0], starts[0], options.steps)
        ctx.options, ctx.states, ctx.dtype = options, len(starts), gates.dtype
        ctx.compact_like = None if compact is None else (compact.shape, compact.dtype)
        ctx.save_for_backward(weight, bias, projection, inputs, *starts, *kept)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, *of_ends: Tensor | None) -> tuple[Tensor | None, ...]:
        options: RecurrentOptions = ctx.options
        weight, bias, projection, inputs, *tensors = ctx.saved_tensors
        starts, kept = tensors[: ctx.states], tensors[ctx.states :]
        of_weight, of_bias, of_projection = ctx.needs_input_grad[2:5]
        steps, weights = options.steps, Weights(weight, None, projection).to(ctx.dtype)
        ends = [
            torch.zeros_like(start) if end is None else end.clone(memory_format=torch.contiguous_format)
            for start, end in zip(starts, of_ends, strict=True)
        ]
        with without_autocast(kept[0]):
            cell = CELLS[steps.cell][1](steps, kept, starts, ends[1:], weights)
            given = None if of_out is None else steps.views(of_out)
            arrived = kept[0].new_empty((*kept[0].shape[:-1], ends[0].shape[-1])) if of_projection else None
            taken = None if arrived is None else steps.views(arrived)
            rows = [view.shape[0] for view in steps.views(cell.products)]
            for block in steps.blocks(cell.products):
                cell.prepare(block)
                for t in _computed(block.backward, cell.products):
                    gradient = ends[0][: rows[t]]
                    if given is not None:
                        gradient.add_(given[t])
                    if taken is not None:
                        taken[t].copy_(gradient)
                    cell.step(t, gradient)
            products = cell.products
            compact_gradient = None
            if ctx.compact_like is not None:
                compact_gradient = _compact_gradient(ctx.compact_like, options, products, inputs, weights.hidden)
            made = [None, compact_gradient]
            made.append(_product(products, inputs).to(weight.dtype) if of_weight else None)
            made.append(products.flatten(0, -2).sum(0).to(bias.dtype) if of_bias else None)
            made.append(_product(arrived, cell.states()).to(projection.dtype) if arrived is not None else None)
            return (*made, cell.gates(), *ends)


def _compact_gradient(
    like: tuple[torch.Size, torch.dtype], options: RecurrentOptions, products: Tensor, inputs: Tensor, weight: Tensor
) -> Tensor:
    selected = options.selected
    assert selected is not None
    total = torch.zeros(like[0], dtype=like[1], device=products.device)
    if selected.gates is None:
        add_weight_gradient(total, products, inputs, LayerCall(Linear(), selected))
    else:
        gates = Gates.of(selected, selected.gates, products.shape[0], Linear().channel_dim)
        gates.add_gradient(total, products @ weight, inputs, slice(None))
    return total


def _product(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Gradient of a full weight, [out, in]."""
    return gradient.flatten(0, -2).t() @ inputs.flatten(0, -2)
