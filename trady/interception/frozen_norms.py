"""Scale and shift of batch normalisations whose statistics are fixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from trady.ops.frozen_norm import FrozenNorm


class FrozenNorms:
    """Scale and shift of every frozen normalisation, computed again only when its statistics have changed.

    A plan names a normalisation's buffers as they were when it was traced; ``model.to(...)`` replaces
    buffers, so they are looked up by their place in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = {
            id(tensor): (module, name) for module in model.modules() for name, tensor in module._buffers.items()
        }
        self._known: dict[int, tuple[tuple[Any, ...], tuple[Tensor, Tensor]]] = {}

    def scale_and_shift(self, norm: FrozenNorm) -> tuple[Tensor, Tensor]:
        """Return scale and shift, one of each a channel."""
        mean, variance = self._now(norm.mean), self._now(norm.variance)
        sources = (mean, variance, norm.weight, norm.bias)
        state = tuple((id(t), t._version, t.device) if t is not None else None for t in sources)
        known = self._known.get(id(norm.mean))
        if known is None or known[0] != state:
            known = (state, replace(norm, mean=mean, variance=variance).scale_and_shift())
            self._known[id(norm.mean)] = known
        return known[1]

    def forget(self) -> None:
        """Let go of all of them."""
        self._known.clear()

    def _now(self, buffer: Tensor) -> Tensor:
        place = self._places.get(id(buffer))
        if place is None:
            return buffer
        now = place[0]._buffers.get(place[1])
        return buffer if now is None else now
