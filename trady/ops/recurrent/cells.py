"""What the cells of recurrent layers compute at a step, and its gradient (``torch.nn.LSTM``, ``GRU``, ``RNN``).

``gates`` come with the products of the inputs in them, and are overwritten. The state before a step is ``h``, of an
LSTM also ``c``; ``W`` is the weight of the hidden states.
"""

# S sequences at a step, H features of the hidden state, D cells (H without a projection), Q gates (4 D of an LSTM, 3 D
# of a GRU, D of an RNN): gates[t] is [S, Q], W [Q, H], a projection [H, D]. A prime marks the state after the step.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trady.ops.recurrent.steps import Block, Steps

_sigmoid_gradient = torch.ops.aten.sigmoid_backward.grad_input

_tanh_gradient = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True)
class Weights:
    """What hidden states are multiplied by, ``[gates, features]``.

    Attributes:
        hidden: The weight ``W``.
        bias: Its bias.
        projection: Of an LSTM, what makes the hidden state smaller: ``[features, cells]``.
    """

    hidden: Tensor
    bias: Tensor | None = None
    projection: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in another type."""
        return Weights(*(None if t is None else t.to(dtype) for t in (self.hidden, self.bias, self.projection)))  # type: ignore[arg-type]


class Cell(Protocol):
    """The steps of one pass forward."""

    def __init__(self, steps: Steps, gates: Tensor, starts: Sequence[Tensor], weights: Weights) -> None: ...

    def step(self, t: int, before: Tensor, out: Tensor) -> None:
        """Compute the hidden state after step ``t`` into ``out``."""
        ...

    def kept(self, out: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass reads; ``out`` are all hidden states."""
        ...

    def ends(self) -> tuple[Tensor, ...]:
        """The states after the last step, except the hidden one."""
        ...


class CellGradient(Protocol):
    """The steps of one pass backward.

    Attributes:
        products: Gradient of the product with the hidden states, of all steps.
    """

    products: Tensor

    def __init__(
        self, steps: Steps, kept: Sequence[Tensor], starts: Sequence[Tensor], ends: Sequence[Tensor], weights: Weights
    ) -> None: ...

    def prepare(self, block: Block) -> None:
        """Compute what does not depend on later steps."""
        ...

    def step(self, t: int, gradient: Tensor) -> None:
        """Turn the gradient of the hidden state after step ``t`` into that of the state before it, in place."""
        ...

    def states(self) -> Tensor:
        """All hidden states, before a projection."""
        ...

    def gates(self) -> Tensor:
        """The gradient of the incoming gates; ``products`` is overwritten."""
        ...


class Lstm:
    """``i, f, o = σ(gates)``, ``g = tanh(gates)``, ``c' = f c + i g``, ``h' = o tanh(c')``; then the projection."""

    def __init__(self, steps: Steps, gates: Tensor, starts: Sequence[Tensor], weights: Weights) -> None:
        self._steps, self._start, self._projection = steps, starts[1], weights.projection
        if weights.bias is not None:
            gates.add_(weights.bias)
        width = gates.shape[-1] // 4
        self._kept = gates, gates.new_empty((*gates.shape[:-1], width))
        self._weight, self._gates, self._cells = weights.hidden.t(), *map(steps.views, self._kept)
        self._input_and_forget = steps.views(gates[..., : 2 * width])
        self._input, self._forget, self._new, self._output = map(steps.views, gates.chunk(4, -1))

    def step(self, t: int, before: Tensor, out: Tensor) -> None:
        """Compute step ``t``."""
        self._gates[t].addmm_(before, self._weight)
        self._input_and_forget[t].sigmoid_()
        new, output, cell = self._new[t].tanh_(), self._output[t].sigmoid_(), self._cells[t]
        torch.addcmul(self._input[t] * new, self._forget[t], self._steps.before(self._cells, self._start, t), out=cell)
        if self._projection is None:
            torch.mul(output, cell.tanh(), out=out)
        else:
            torch.mm(cell.tanh().mul_(output), self._projection.t(), out=out)

    def kept(self, out: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass reads."""
        return self._kept

    def ends(self) -> tuple[Tensor, ...]:
        """The states after the last step, except the hidden one."""
        return (self._steps.last(self._cells),)


class LstmGradient:
    """``dc += o (1 - tanh²(c')) dh``, from which ``di``, ``df``, ``dg`` follow, ``do`` from ``dh``; ``dc = f dc``."""

    def __init__(
        self, steps: Steps, kept: Sequence[Tensor], starts: Sequence[Tensor], ends: Sequence[Tensor], weights: Weights
    ) -> None:
        self._steps, self._weights, self._start, (self.cell,) = steps, weights, starts[1], ends
        self._gates, self._cells = kept
        self.products = torch.empty_like(self._gates)
        width = self._cells.shape[-1]
        self._of_gates, self._cell = steps.views(self.products), steps.views(self._cells)
        of_cell = self.products[..., : 3 * width].unflatten(-1, (3, width))
        self._of_cell = steps.views(of_cell)
        self._forget = steps.views(self._gates[..., width : 2 * width])
        self._of_forget, self._of_output = (steps.views(self.products[..., n * width :][..., :width]) for n in (1, 3))
        self._per_state: dict[int, Tensor] = {}

    def prepare(self, block: Block) -> None:
        """Compute what does not depend on later steps."""
        i, f, g, o = block.of(self._gates).chunk(4, -1)
        di, df, dg, do = block.of(self.products).chunk(4, -1)
        squashed = block.of(self._cells).tanh()
        _sigmoid_gradient(g, i, grad_input=di)
        torch.addcmul(f, f, f, value=-1, out=df)
        _tanh_gradient(i, g, grad_input=dg)
        _sigmoid_gradient(squashed, o, grad_input=do)
        self._per_state = block.views(torch.ops.aten.tanh_backward(o, squashed))

    def step(self, t: int, gradient: Tensor) -> None:
        """Go one step back."""
        rows, projection = gradient.shape[0], self._weights.projection
        of_state = gradient if projection is None else gradient @ projection
        cell = self.cell[:rows].addcmul_(of_state, self._per_state[t])
        self._of_cell[t].mul_(cell.unsqueeze(1))
        self._of_forget[t].mul_(self._steps.before(self._cell, self._start, t))
        self._of_output[t].mul_(of_state)
        cell.mul_(self._forget[t])
        torch.mm(self._of_gates[t], self._weights.hidden, out=gradient)

    def states(self) -> Tensor:
        """All hidden states, before a projection."""
        width = self._cells.shape[-1]
        return self._cells.tanh().mul_(self._gates[..., -width:])

    def gates(self) -> Tensor:
        """The gradient of the incoming gates."""
        return self.products


class Gru:
    """``r, z = σ(gates)``, ``n = tanh(gate + r (W h + b))``, ``h' = n + z (h - n)``."""

    def __init__(self, steps: Steps, gates: Tensor, starts: Sequence[Tensor], weights: Weights) -> None:
        width = gates.shape[-1] // 3
        both = gates[..., : 2 * width]
        if weights.bias is not None:
            both.add_(weights.bias[: 2 * width])
        self._bias = None if weights.bias is None else weights.bias[2 * width :]
        self._kept = gates, gates.new_empty((*gates.shape[:-1], width))
        self._to_both, self._to_new = weights.hidden[: 2 * width].t(), weights.hidden[2 * width :].t()
        self._both, self._product = steps.views(both), steps.views(self._kept[1])
        self._reset, self._update, self._new = map(steps.views, gates.chunk(3, -1))

    def step(self, t: int, before: Tensor, out: Tensor) -> None:
        """Compute step ``t``."""
        self._both[t].addmm_(before, self._to_both).sigmoid_()
        product = self._product[t]
        if self._bias is None:
            torch.mm(before, self._to_new, out=product)
        else:
            torch.addmm(self._bias, before, self._to_new, out=product)
        new = self._new[t].addcmul_(self._reset[t], product).tanh_()
        torch.lerp(new, before, self._update[t], out=out)

    def kept(self, out: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass reads."""
        return (*self._kept, out)

    def ends(self) -> tuple[Tensor, ...]:
        """The states after the last step, except the hidden one."""
        return ()


class GruGradient:
    """All gates' gradients are multiples of ``dh``; by ``(h - n) z = h' - n`` the state before is not needed."""

    def __init__(
        self, steps: Steps, kept: Sequence[Tensor], starts: Sequence[Tensor], ends: Sequence[Tensor], weights: Weights
    ) -> None:
        self._gates, self._product, self._out = kept
        self._weight, width = weights.hidden, self._out.shape[-1]
        self.products, self._new = torch.empty_like(self._gates), torch.empty_like(self._product)
        self._of_products, self._of_new = steps.views(self.products), steps.views(self._new)
        self._of_state = steps.views(self.products.unflatten(-1, (3, width)))
        self._update = steps.views(self._gates[..., width : 2 * width])

    def prepare(self, block: Block) -> None:
        """Compute what does not depend on later steps."""
        r, z, n = block.of(self._gates).chunk(3, -1)
        dr, dz, d_product = block.of(self.products).chunk(3, -1)
        dn, rest = block.of(self._new), 1 - z
        _tanh_gradient(rest, n, grad_input=dn)
        torch.mul(block.of(self._out) - n, rest, out=dz)
        torch.mul(dn, block.of(self._product), out=rest)
        _sigmoid_gradient(rest, r, grad_input=dr)
        torch.mul(dn, r, out=d_product)

    def step(self, t: int, gradient: Tensor) -> None:
        """Go one step back."""
        self._of_state[t].mul_(gradient.unsqueeze(1))
        self._of_new[t].mul_(gradient)
        gradient.mul_(self._update[t]).addmm_(self._of_products[t], self._weight)

    def states(self) -> Tensor:
        """All hidden states, before a projection."""
        return self._out

    def gates(self) -> Tensor:
        """The gradient of the incoming gates."""
        self.products[..., -self._new.shape[-1] :].copy_(self._new)
        return self.products


class Plain:
    """``h' = tanh(gates + W h)``, or ``h' = relu(gates + W h)``."""

    def __init__(self, steps: Steps, gates: Tensor, starts: Sequence[Tensor], weights: Weights) -> None:
        if weights.bias is not None:
            gates.add_(weights.bias)
        self._weight, self._gates, self._tanh = weights.hidden.t(), steps.views(gates), steps.cell == "rnn_tanh"

    def step(self, t: int, before: Tensor, out: Tensor) -> None:
        """Compute step ``t``."""
        made = self._gates[t].addmm_(before, self._weight)
        if self._tanh:
            torch.tanh(made, out=out)
        else:
            torch.clamp(made, min=0, out=out)

    def kept(self, out: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass reads."""
        return (out,)

    def ends(self) -> tuple[Tensor, ...]:
        """The states after the last step, except the hidden one."""
        return ()


class PlainGradient:
    """The derivative of the activation, from its result, times ``dh``."""

    def __init__(
        self, steps: Steps, kept: Sequence[Tensor], starts: Sequence[Tensor], ends: Sequence[Tensor], weights: Weights
    ) -> None:
        (self._out,), self._weight, self._tanh = kept, weights.hidden, steps.cell == "rnn_tanh"
        self.products = torch.empty_like(self._out)
        self._of_gates = steps.views(self.products)

    def prepare(self, block: Block) -> None:
        """Compute what does not depend on later steps."""
        out, made = block.of(self._out), block.of(self.products)
        if self._tanh:
            torch.mul(out, out, out=made).neg_().add_(1)
        else:
            made.copy_(out > 0)

    def step(self, t: int, gradient: Tensor) -> None:
        """Go one step back."""
        torch.mm(self._of_gates[t].mul_(gradient), self._weight, out=gradient)

    def states(self) -> Tensor:
        """All hidden states, before a projection."""
        return self._out

    def gates(self) -> Tensor:
        """The gradient of the incoming gates."""
        return self.products


#: By name of the cell, its pass forward and backward.
CELLS: dict[str, tuple[type[Cell], type[CellGradient]]] = {
    "lstm": (Lstm, LstmGradient),
    "gru": (Gru, GruGradient),
    "rnn_tanh": (Plain, PlainGradient),
    "rnn_relu": (Plain, PlainGradient),
}
