"""What people's code sees of a weight whose channels train, between forward passes: a parameter that trains.

In a forward pass a weight is a constant, and its compact parameter gets the gradient. Everywhere else code names the
weight: a penalty in the loss, ``zero_grad()``, clipping, a loop over ``named_parameters()``. There it requires a
gradient, as the masked weight that it stands for would:

* Computed with, its gradient flows on to the compact parameter, ``dL/dW[:, c]``, through one node of the graph; so it
  adds up with that of the forward pass before any hook or update sees it.
* ``grad``, ``requires_grad`` and hooks are those of the compact parameter, in the weight's shape
  (:mod:`trady.ops.channel_gradient`).

A weight that is stored quantised is no function of its channels: it shows their gradient, in the shape of what it is
dequantised to, and hides that it is no parameter that trains.

The weight stays the object that it was; only its class is another one meanwhile.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from trady.errors import StateError
from trady.interception.layer import ArmedLayer
from trady.interception.shown_stored import ShownStored
from trady.model.prepared import plain_class
from trady.ops.channel_gradient import ChannelGradient, WeightChannels
from trady.ops.once import apply
from trady.ops.parameter_class import note_class
from trady.ops.selected import DenseWeight, SelectedChannels, gather_channels

#: By the identity of a weight, its layer.
_layers: weakref.WeakValueDictionary[int, ArmedLayer] = weakref.WeakValueDictionary()


class ShownWeights:
    """The weights of one model; from :meth:`begin` to :meth:`end`, those of a tuner.

    Args:
        layers: The layers that can be updated by channel.
    """

    def __init__(self, layers: Iterable[ArmedLayer]) -> None:
        self._layers: list[ArmedLayer] = []
        #: Layers whose weight cannot be in a graph: it is stored quantised.
        self._stored: list[ArmedLayer] = []
        for layer in layers:
            (self._layers if isinstance(layer.truth, DenseWeight) else self._stored).append(layer)
        self._begun = self._shown = False
        self._asked: str | None = None
        #: Gradient and hooks of each weight, from before it was shown.
        self._before: list[tuple[Tensor | None, Any, Any]] = []
        self._handles: list[Any] = []

    def begin(self) -> None:
        """Show the weights from now on."""
        self._begun = True
        _layers.update((id(layer.weight), layer) for layer in (*self._layers, *self._stored))
        for layer in self._layers:
            weight: Any = layer.weight
            self._before.append((weight.grad, weight._backward_hooks, weight._post_accumulate_grad_hooks))
            weight.grad = None
        self.show()
        for layer, (_, hooks, after) in zip(self._layers, self._before, strict=True):
            self._handles += [layer.weight.register_hook(_while_there(hooks, key)) for key in hooks or ()]
            see: Any = layer.weight.register_post_accumulate_grad_hook
            self._handles += [see(_while_there(after, key)) for key in after or ()]

    def show(self) -> None:
        """Let the weights be parameters that train, now that no forward pass runs."""
        if self._shown or not self._begun:
            return
        self._shown = True
        with _unsafe_preserve_version_counter(tuple(layer.weight for layer in self._layers)), _with_graphs():
            for layer in self._layers:
                layer.weight.__class__ = _shown_class(type(layer.weight))
            _connect(self._layers)
        for layer in self._stored:
            layer.weight.__class__ = _shown_class(type(layer.weight), ShownStored)

    def hide(self) -> None:
        """Let the weights be constants, for a forward pass."""
        if not self._shown:
            return
        self._shown = False
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            for asked in _disconnect(self._layers):
                self._asked = asked.name
            for layer in self._layers:
                layer.weight.__class__ = plain_class(type(layer.weight))
            for layer in self._stored:
                layer.weight.__class__ = plain_class(type(layer.weight))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the weights be constants for a while, also between forward passes."""
        begun, self._begun = self._begun, False
        self.hide()
        try:
            yield
        finally:
            self._begun = begun
            self.show()

    def drawn(self) -> None:
        """Follow a draw of other channels; the node of the last one would keep its channels."""
        if self._shown:
            _reconnect(self._layers)

    def check_not_asked(self) -> None:
        """Refuse that a backward pass was asked for gradients of the weights alone.

        Raises:
            StateError: It was; the forward pass has none for them, but for their channels.

        """
        if self._shown and any(_RETAINS.__get__(layer.weight) for layer in self._layers):
            self.hide()
            self.show()
        asked, self._asked = self._asked, None
        if asked is not None:
            raise StateError(
                f"backward(inputs=...) was asked for the gradient of the weight of {asked}, whose channels train in "
                "its place: ask for inputs=list(tuner.parameters())"
            )

    def end(self) -> None:
        """Give the weights back as they were."""
        self.hide()
        self._begun = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        # PyTorch has dropped these when the weights became functions of their channels.
        for layer, (gradient, hooks, after) in zip(self._layers, self._before, strict=False):
            weight: Any = layer.weight
            weight.grad, weight._backward_hooks, weight._post_accumulate_grad_hooks = gradient, hooks, after
        self._before = []
        for layer in (*self._layers, *self._stored):
            _layers.pop(id(layer.weight), None)


#: By the identity of a weight, what shows its gradient to somebody.
_gradients: weakref.WeakValueDictionary[int, ChannelGradient] = weakref.WeakValueDictionary()

#: What the class of a shown weight hides, as it is for PyTorch.
_RETAINS: Any = torch.Tensor.retains_grad
_REQUIRES: Any = torch.Tensor.requires_grad


class _Named(torch.autograd.Function):
    """Weights as functions of their compact parameters."""

    @staticmethod
    def forward(ctx: Any, channels: list[_Channels], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.channels = channels
        weights = tensors[: len(channels)]
        ctx.mark_dirty(*weights)
        ctx.set_materialize_grads(False)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found = map(_gathered, ctx.channels, gradients)
        return (None, *(None,) * len(gradients), *found)


#: How the layer of a weight computes, its groups, and the channels that train.
_Channels = tuple[str, int, SelectedChannels]


def _gathered(channels: _Channels, gradient: Tensor | None) -> Tensor | None:
    """The gradient of a weight's channels."""
    if gradient is None:
        return None
    kind, groups, selected = channels
    selected.check_current()
    return gather_channels(gradient, kind, groups, selected)


@contextmanager
def _with_graphs() -> Iterator[None]:
    """Context in which graphs are made, whatever the loop has switched off."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _connect(layers: Iterable[ArmedLayer]) -> None:
    """Make weights functions of their channels, by one node of the graph; inside of :func:`_with_graphs`."""
    by_device: dict[torch.device, tuple[list[_Channels], list[Tensor], list[Tensor]]] = {}
    for layer in layers:
        truth, selected, compact = layer.truth, layer.selected, layer.compact
        if selected is not None and compact.requires_grad and isinstance(truth, DenseWeight):
            channels, weights, leaves = by_device.setdefault(compact.device, ([], [], []))
            channels.append((truth.kind, truth.groups, selected))
            weights.append(layer.weight)
            leaves.append(compact)
    for channels, weights, leaves in by_device.values():
        apply(_Named, channels, *weights, *leaves)


def _disconnect(layers: Iterable[ArmedLayer]) -> list[ArmedLayer]:
    """Make weights constants, outside of inference mode; return those whose gradients were asked for."""
    connected = [layer for layer in layers if _REQUIRES.__get__(layer.weight)]
    asked = [layer for layer in connected if _RETAINS.__get__(layer.weight)]
    for layer in connected:
        layer.weight.detach_()
    for layer in asked:  # PyTorch has no other way to end what retain_grad() has begun; the node that knew it is gone
        torch._C._swap_tensor_impl(layer.weight, layer.weight.detach())
    return asked


def _reconnect(layers: Iterable[ArmedLayer]) -> None:
    layers = [layer for layer in layers if isinstance(layer.truth, DenseWeight)]
    with _unsafe_preserve_version_counter(tuple(layer.weight for layer in layers)), _with_graphs():
        _disconnect(layers)
        _connect(layers)


def _channels(layer: ArmedLayer) -> WeightChannels:
    weight, truth = layer.weight, layer.truth
    assert layer.selected is not None
    if not isinstance(truth, DenseWeight):
        return WeightChannels(truth.shape, (truth.shape[1], 1), "linear", 1, layer.selected)
    return WeightChannels(weight.shape, weight.stride(), truth.kind, truth.groups, layer.selected)


def _in_shape(layer: ArmedLayer, values: Tensor | None) -> ChannelGradient | None:
    """A gradient of the channels as one of the weight."""
    return None if values is None or layer.selected is None else ChannelGradient(values, _channels(layer))


def _while_there(hooks: Any, key: int) -> Callable[[Any], Any]:
    """A hook that was registered before a weight was shown, until its handle is removed."""
    return lambda value: hooks[key](value) if key in hooks else None


def _same(layer: ArmedLayer, values: Tensor | None) -> ChannelGradient | None:
    """The gradient of a weight, the same object as long as somebody holds it."""
    shown = _gradients.get(id(layer.weight))
    if shown is None or shown.held is not values or shown.channels.selected is not layer.selected:
        shown = _in_shape(layer, values)
        if shown is not None:
            _gradients[id(layer.weight)] = shown
    return shown


def _of_channels(layer: ArmedLayer, gradient: Tensor | None) -> Tensor | None:
    """A gradient of the weight as one of the channels."""
    if gradient is None or layer.selected is None:
        return None
    channels = _channels(layer)
    if isinstance(gradient, ChannelGradient) and gradient.shape == channels.shape and not gradient.views:
        return gradient.held
    if gradient.shape != channels.shape:
        raise RuntimeError(
            f"a gradient of shape {tuple(gradient.shape)} for {layer.name}, whose weight has "
            f"{tuple(channels.shape)}: give one of the weight's shape"
        )
    return channels.gather(gradient).to(layer.compact)


def _layer_of(weight: Any) -> ArmedLayer | None:
    """The layer of a shown weight; where model and tuner are gone, the weight is a plain one from now on."""
    layer = _layers.get(id(weight))
    if layer is None:
        stored = isinstance(weight, ShownStored)
        weight.__class__ = plain_class(type(weight))
        if not stored:
            weight.detach_()
    return layer


class _Shown:
    """What a shown weight has in the place of :class:`torch.nn.Parameter`'s own."""

    __slots__ = ()

    @property
    def grad(self) -> Tensor | None:
        layer = _layer_of(self)
        return self.grad if layer is None else _same(layer, layer.compact.grad)

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        layer = _layer_of(self)
        if layer is None:
            self.grad = gradient
        else:
            layer.compact.grad = _of_channels(layer, gradient)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    @property
    def is_leaf(self) -> bool:
        return True

    @property
    def grad_fn(self) -> None:
        return None

    @property
    def grad_dtype(self) -> torch.dtype:
        layer = _layer_of(self)
        return self.grad_dtype if layer is None else layer.compact.dtype

    @property
    def requires_grad(self) -> bool:
        # DistributedDataParallel makes buckets for all that requires a gradient, and waits for each: compact gradients
        # are averaged as they arrive.
        asks = sys._getframe(1).f_globals.get("__name__")
        layer = _layer_of(self)
        return asks != "torch.nn.parallel.distributed" and layer is not None and layer.compact.requires_grad

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        layer = _layer_of(self)
        if layer is None:
            return self.requires_grad_(requires_grad)
        layer.compact.requires_grad_(requires_grad)
        _reconnect([layer])
        return self

    def retain_grad(self) -> None:
        """Do nothing, as for every leaf."""

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        mine = _layer_of(self)
        if mine is None:
            return self.register_hook(hook)
        known = weakref.ref(mine)

        def seen(values: Tensor) -> Tensor | None:
            layer = known()
            if layer is None or (gradient := _in_shape(layer, values)) is None:
                return None
            return _of_channels(layer, hook(gradient))

        return mine.compact.register_hook(seen)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Any], None]) -> Any:
        layer = _layer_of(self)
        if layer is None:
            return self.register_post_accumulate_grad_hook(hook)
        known: Any = weakref.ref(self)
        compact: Any = layer.compact
        return compact.register_post_accumulate_grad_hook(lambda _: None if (mine := known()) is None else hook(mine))

    def __repr__(self) -> str:
        mine: Any = self
        return repr(plain_class(type(mine))(mine.detach(), mine.requires_grad))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            mine: Any = self
            kind = plain_class(type(mine))
            memo[id(self)] = kind(mine.data.clone(memory_format=torch.preserve_format), mine.requires_grad)
        return memo[id(self)]


@lru_cache(maxsize=64)
def _shown_class(kind: type[nn.Parameter], *above: type) -> type[nn.Parameter]:
    metaclass: Any = type(kind)
    made: type[nn.Parameter] = metaclass(
        kind.__name__, (*above, _Shown, kind), {"__slots__": (), "__module__": kind.__module__}
    )
    note_class(made, kind)
    return made
