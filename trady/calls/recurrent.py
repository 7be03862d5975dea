"""Recurrent layers decomposed: ``torch.lstm`` and its like as linear layers and steps that depend on each other.

PyTorch hands a whole ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` over as one call. Here the products with the inputs are
linear layers over all steps at once, those with the hidden states belong to
:func:`trady.ops.recurrent.recurrence.recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.ops.recurrent.recurrence import recurrence
from trady.ops.recurrent.steps import Steps


def _layer(cell: str, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Any of ``torch.lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu``, in both of their signatures.

    ``x, states, weights, has_biases, layers, dropout, train, bidirectional, batch_first``, or of packed sequences
    ``rows, batch_sizes, states, weights, has_biases, layers, dropout, train, bidirectional``.
    """
    packed = isinstance(arguments[2], (list, tuple))
    if packed:
        sizes, *arguments = arguments  # type: ignore[assignment]
        arguments = (*arguments, False)
    states, weights, has_biases, layers, dropout, train, bidirectional, batch_first = arguments
    states = tuple(states) if isinstance(states, (list, tuple)) else (states,)
    steps = (
        partial(Steps, cell, None, sizes=tuple(sizes.tolist())) if packed else partial(Steps, cell, int(batch_first))
    )
    directions = 2 if bidirectional else 1
    count = len(weights) // (layers * directions)
    ends = []
    for layer in range(layers):
        outputs = []
        for place in range(layer * directions, (layer + 1) * directions):
            starts = [state[place] for state in states]
            own = weights[place * count : (place + 1) * count]
            reverse = place % directions == 1
            out, *end = _direction(x, starts, own, has_biases, steps(reverse=reverse))
            outputs.append(out)
            ends.append(end)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout, True)
    return (x, *(torch.cat([end.unsqueeze(0) for end in of_all]) for of_all in zip(*ends, strict=True)))


def _direction(
    x: Tensor, starts: Sequence[Tensor], weights: Sequence[Tensor], has_biases: bool, steps: Steps
) -> tuple[Tensor, ...]:
    """One direction of one layer; a projection is the last of its weights."""
    weight, hidden_weight, *others = weights
    bias, hidden_bias = others[:2] if has_biases else (None, None)
    projection = others[-1] if len(others) % 2 else None
    return recurrence(F.linear(x, weight, bias), starts, hidden_weight, hidden_bias, projection, steps)


def _cell(
    cell: str,
    x: Tensor,
    states: Any,
    weight: Tensor,
    hidden_weight: Tensor,
    bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> Any:
    """``torch.lstm_cell`` and its like: a single step."""
    starts = list(states) if isinstance(states, (list, tuple)) else [states]
    _, *ends = recurrence(F.linear(x, weight, bias), starts, hidden_weight, hidden_bias, None, Steps(cell))
    return tuple(ends) if len(ends) > 1 else ends[0]


#: By function, the same computation in calls that are seen one by one. A new cell is its name here, and its steps in
#: :data:`trady.ops.recurrent.cells.CELLS`.
RECURRENT: dict[Any, Callable[..., Any]] = {
    function: partial(_layer, cell)
    for cell, function in {
        "lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu,
    }.items()
} | {
    function: partial(_cell, cell)
    for cell, function in {
        "lstm": torch.lstm_cell, "gru": torch.gru_cell,
        "rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell,
    }.items()
}  # fmt: skip
