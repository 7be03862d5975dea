"""Computes single calls of an armed model: as the plan wants it, by the handler that the kind of call declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from trady.calls.actions import Action, Done, Leave
from trady.calls.handling import Handling, TrainedLayer
from trady.calls.recognize import kind_of, recognize
from trady.interception.frozen_norms import FrozenNorms
from trady.interception.layer import ArmedLayer
from trady.ops.frozen_norm import FrozenNorm
from trady.ops.selected import SelectedChannels


class Handlers:
    """Computes the calls of one model.

    Args:
        layers: The layers that can be updated by channel.
        head: Identities of parameters that train through PyTorch's own backward.
        norms: Its frozen normalisations.
        fidelity: ``exact``, or the bits in which smooth activations keep their derivative
            (trady.ops.smooth.FIDELITIES).

    """

    def __init__(self, layers: Sequence[ArmedLayer], head: set[int], norms: FrozenNorms, fidelity: str) -> None:
        self.layers: Mapping[int, ArmedLayer] = {id(layer.weight): layer for layer in layers}
        self.head, self.norms, self.fidelity = head, norms, fidelity
        self._on_layer: Callable[[str, Tensor], None] | None = None

    def watch(self, on_layer: Callable[[str, Tensor], None]) -> None:
        """Call ``on_layer`` with the name and the result of every layer that has been computed, from now on."""
        self._on_layer = on_layer

    def compute(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        action: Action | None,
        *,
        graph_only: bool = False,
        commit: Callable[[], None] = lambda: None,
    ) -> Any:
        """Compute one call.

        Args:
            func: The torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            action: How the plan wants it computed.
            graph_only: Whether nobody reads the values of its result.
            commit: Called when a value was put off or overwritten.

        """
        if isinstance(action, Done):
            commit()
            return args[0] if args else kwargs["input"]
        if isinstance(action, Leave):
            return func(*args, **kwargs)
        call = recognize(func, args, kwargs)
        handler = None if call is None else kind_of(call).handler
        if handler is None:
            return func(*args, **kwargs)
        out = handler(call, self.handling(action, commit, graph_only=graph_only))
        return func(*args, **kwargs) if out is None else out

    def again(
        self,
        func: Any,
        action: Action | None,
        commit: Callable[[], None],
        graph_only: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute a call at a place that is known."""
        return self.compute(func, args, kwargs, action, graph_only=graph_only, commit=commit)

    def handling(self, action: Action | None, commit: Callable[[], None], *, graph_only: bool = False) -> Handling:
        """What the computation of a call may ask, and what it tells."""
        return _Handled(self, action, graph_only, commit)

    @property
    def watched(self) -> bool:
        """Whether somebody wants to hear of layers."""
        return self._on_layer is not None

    def ran(self, layer: str, out: Tensor) -> None:
        """Note that a layer has been computed."""
        if self._on_layer is not None:
            self._on_layer(layer, out)

    def trained(self, weight: int) -> tuple[SelectedChannels, Tensor] | None:
        """Channels that train of the layer with this weight, given by its identity, and what gets their gradient."""
        layer = self.layers.get(weight)
        return None if layer is None or layer.leaf is None or layer.selected is None else (layer.selected, layer.leaf)


class _Handled:
    """One call that is being computed; see :class:`trady.calls.handling.Handling`."""

    __slots__ = ("_handlers", "action", "commit", "graph_only")

    def __init__(self, handlers: Handlers, action: Action | None, graph_only: bool, commit: Callable[[], None]) -> None:
        self._handlers, self.action, self.graph_only, self.commit = handlers, action, graph_only, commit

    @property
    def fidelity(self) -> str:
        return self._handlers.fidelity

    @property
    def watched(self) -> bool:
        return self._handlers.watched

    def in_head(self, *parameters: Tensor | None) -> bool:
        return any(id(parameter) in self._handlers.head for parameter in parameters if parameter is not None)

    def layer_of(self, weight: Tensor) -> ArmedLayer | None:
        return self._handlers.layers.get(id(weight))

    def scale_and_shift(self, norm: FrozenNorm) -> tuple[Tensor, Tensor]:
        return self._handlers.norms.scale_and_shift(norm)

    def ran(self, layer: TrainedLayer, out: Tensor) -> None:
        self._handlers.ran(layer.name, out)
