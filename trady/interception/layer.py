"""One layer whose input channels can train."""

from __future__ import annotations

from torch import Tensor, nn

from trady.ops.selected import DenseWeight, SelectedChannels
from trady.quantized.linear import QuantizedLinear


class ArmedLayer:
    """The channels of one layer that train now, and where their gradient goes.

    Attributes:
        weight: The frozen weight.
        truth: What the trained channels are read from and written to: this weight, or of a quantised one the layer
            with its float channels.
        compact: What an optimizer updates: the same object over all draws, while its shape changes.
        leaf: The same values as the graph's own leaf: one a draw, since autograd remembers a leaf's shape
            as long as any graph refers to it.
        selected: The channels; ``None`` when none trains.
    """

    __slots__ = ("compact", "leaf", "name", "selected", "truth", "weight")

    def __init__(
        self, name: str, weight: nn.Parameter, truth: DenseWeight | QuantizedLinear, compact: nn.Parameter
    ) -> None:
        self.name, self.weight, self.truth, self.compact = name, weight, truth, compact
        self.leaf: Tensor | None = None
        self.selected: SelectedChannels | None = None

    @property
    def versions(self) -> tuple[int, int]:
        """How often compact parameter and weight have been written to."""
        return self.compact._version, self.truth.version
