"""Linear layers that are stored quantised, with float channels beside their weight.

An update is smaller than a quantisation step, so a channel that has trained stays in floating point, in two buffers of
its module. The module computes with them from then on, armed or finished, and ``state_dict()`` holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from trady.ops.selected import SelectedChannels
from trady.quantized.formats import MetaFormat, Stored, stored_in

#: Buffers of a quantised module: indices of its float channels [k], sorted, and their weights [k, out].
INDEX, VALUES = "float_channels", "float_values"


class QuantizedLinear:
    """The forward of a quantised linear layer, some of whose channels may be in floating point.

    It replaces the module's own ``forward``, so that trace and interception see every library's product as one call
    (:func:`linear`).
    """

    def __init__(self, module: nn.Module, stored: Stored) -> None:
        self.module, self.stored = module, stored
        self._before = module.__dict__.get("forward")
        self._writes = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Run as the module's forward."""
        return linear(x, self.weight, self.bias, self)

    @property
    def weight(self) -> Tensor:
        """The module's parameter."""
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The module's bias."""
        return self.module._parameters.get("bias")

    @property
    def shape(self) -> torch.Size:
        """Of the dequantised weight: [out, in]."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the float channels."""
        return self.stored.dtype

    @property
    def version(self) -> int:
        """How often its weight has been written to."""
        return self._writes + self.weight._version

    @property
    def channels(self) -> tuple[Tensor, Tensor] | None:
        """Indices [k] and weights [k, out] of the float channels."""
        index, values = (self.module._buffers.get(name) for name in (INDEX, VALUES))
        return None if index is None or values is None else (index, values)

    def product(self, x: Tensor, *, trains: bool = False) -> Tensor:
        """Apply the layer to ``x`` [..., in], bias included."""
        if x.is_meta:
            return self._meta_product(x, trains)
        if self.channels is None:
            return self._own_product(x)
        index, values = self.channels
        y = self._own_product(x.index_fill(-1, index, 0))
        beside = x.index_select(-1, index) @ values.to(x.dtype)
        return y + beside if torch.is_grad_enabled() else y.add_(beside)

    def _own_product(self, x: Tensor) -> Tensor:
        found: Tensor = type(self.module).forward(self.module, x) if self._before is None else self._before(x)
        return found

    def _meta_product(self, x: Tensor, trains: bool) -> Tensor:
        """Allocate on meta what the product would allocate: masked input, dequantised weight, results."""
        masked = torch.empty_like(x) if trains or self.channels is not None else None
        copies = [torch.empty(self.shape, dtype=x.dtype, device=x.device) for _ in range(self.stored.copies)]
        dense = copies.pop()
        del copies
        out = x.new_empty((*x.shape[:-1], self.shape[0]))
        del dense
        others = [torch.empty_like(out) for _ in range(1, self.stored.copies)]
        del masked, others
        return out

    def dense(self) -> Tensor:
        """Make the dequantised weight [out, in], float channels included."""
        dense = self.stored.dense()
        if self.channels is not None:
            index, values = self.channels
            dense[:, index] = values.t()
        return dense

    def empty(self) -> Tensor:
        """No channel, [0, out]."""
        return torch.empty((0, self.shape[0]), dtype=self.dtype, device=self.weight.device)

    def gather(self, selected: SelectedChannels) -> Tensor:
        """Copy the selected slices: [n, selected output channels]."""
        with torch.no_grad():
            return self.dense().t()[selected.index if selected.outputs is None else selected.place[1:]]

    def scatter_(self, selected: SelectedChannels, values: Tensor) -> None:
        """Write slices of :meth:`gather`; their channels stay in floating point from now on."""
        kept = self.channels or (torch.empty(0, dtype=torch.int64, device=values.device), self.empty())
        index = torch.cat([kept[0], selected.index]).unique()
        with torch.no_grad():
            if len(index) == len(kept[0]):
                rows = kept[1]
            elif selected.outputs is None:
                rows = kept[1].new_empty((len(index), self.shape[0]))
                rows[torch.searchsorted(index, kept[0])] = kept[1]
            else:
                rows = self.dense().t()[index]
            places = torch.searchsorted(index, selected.index)
            rows[places if selected.outputs is None else (places.unsqueeze(1), selected.outputs)] = values.to(
                rows.dtype
            )
        if rows is not kept[1]:
            self.module.register_buffer(INDEX, index)
            self.module.register_buffer(VALUES, rows)
            self.enter()
        self._writes += 1

    def enter(self) -> None:
        """Replace the module's forward."""
        self.module.__dict__["forward"] = self

    def leave(self) -> None:
        """Give the module its own forward back, if it computes the same."""
        if self.channels is None and self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self._before is not None:
                self.module.forward = self._before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
    """Apply a quantised linear layer, [..., in] to [..., out]; modes see it as one torch function."""
    if has_torch_function_unary(x):
        out: Tensor = handle_torch_function(linear, (x,), x, weight, bias, layer)
        return out
    return layer.product(x)


def layer_at(module: nn.Module) -> QuantizedLinear | None:
    """Return what computes a quantised linear layer, routed or not; ``None`` for any other module."""
    routed = module.__dict__.get("forward")
    if isinstance(routed, QuantizedLinear):
        return routed
    stored = stored_in(module)
    return None if stored is None else QuantizedLinear(module, stored)


def route(model: nn.Module) -> dict[int, QuantizedLinear]:
    """Have quantised linear layers computed by :class:`QuantizedLinear`; return them by identity of the weight."""
    found = {}
    for module in model.modules():
        layer = layer_at(module)
        if layer is not None:
            layer.enter()
            found[id(layer.weight)] = layer
    return found


def leave(layers: Mapping[int, QuantizedLinear]) -> None:
    """Give the modules their own forward back, except those with float channels."""
    for layer in layers.values():
        layer.leave()


@contextmanager
def routed(model: nn.Module) -> Iterator[Mapping[int, QuantizedLinear]]:
    """Route the quantised layers of a model inside the context; layers routed before stay so."""
    before = {id(m) for m in model.modules() if isinstance(m.__dict__.get("forward"), QuantizedLinear)}
    layers = route(model)
    try:
        yield layers
    finally:
        leave({key: layer for key, layer in layers.items() if id(layer.module) not in before})


def meta_formats(model: nn.Module) -> dict[int, Any]:
    """Return what a copy of the model without memory has in place of these, by identity: weights, scales, routing.

    The copy has to be routed again: its weights are read in another way.
    """
    alive: list[Any] = []  # keeps identities: a new object could get that of one that is gone
    found: dict[int, Any] = {id(alive): alive}
    for module in model.modules():
        layer = layer_at(module)
        if layer is not None:
            tensors = list(layer.stored.tensors())
            alive += [layer, *tensors]
            found |= {id(t): t.to("meta") for t in tensors}
            found |= {id(layer): None, id(layer.weight): MetaFormat(layer.stored).parameter()}
    return found
