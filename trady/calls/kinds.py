"""The kinds of calls that trady knows, as values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trady.ops.bits import Clamp
from trady.ops.loss import pays, row_losses
from trady.ops.operators import Convolution, Linear
from trady.ops.pooling import Window
from trady.ops.recurrent.steps import Steps
from trady.ops.smooth import Smooth
from trady.quantized.linear import QuantizedLinear


@dataclass(frozen=True)
class WeightCall:
    """``operator`` applied to ``x``: a convolution or a linear layer; ``layer`` where its weight is quantised."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    operator: Convolution | Linear
    layer: QuantizedLinear | None = None

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, or of what a quantised one stands for."""
        return self.weight.shape if self.layer is None else self.layer.shape

    @property
    def output_channels(self) -> int:
        """Number of output channels."""
        return self.weight_shape[1 if self.operator.kind == "addmm" else 0]


@dataclass(frozen=True)
class RecurrentCall(WeightCall):
    """The steps of a recurrent layer: ``weight`` is applied to the hidden state in front of each of them.

    ``x`` are the gates, with the products of the inputs in them; see :func:`trady.ops.recurrent.recurrence.recurrence`.
    """

    states: Sequence[Tensor] = ()
    projection: Tensor | None = None
    steps: Steps = field(default_factory=lambda: Steps(""))

    @property
    def product_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what the weight is applied to, and of what comes of it, all steps together."""
        shape = tuple(self.x.shape)
        return (*shape[:-1], self.weight.shape[1]), shape


@dataclass(frozen=True)
class NormCall:
    """A batch normalisation with running statistics, which trady keeps fixed."""

    x: Tensor
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class ActivationCall:
    """A piecewise linear activation; ``in_place`` when the model itself asks for it."""

    x: Tensor
    clamp: Clamp
    in_place: bool


@dataclass(frozen=True)
class PadCall:
    """Zero padding of the trailing (spatial) dimensions, in the order of ``F.pad``."""

    x: Tensor
    pad: tuple[int, ...]


@dataclass(frozen=True)
class MaxPoolCall:
    """Max pooling that returns values only."""

    x: Tensor
    window: Window


@dataclass(frozen=True)
class AveragePoolCall:
    """Average pooling: linear in its input.

    Attributes:
        pool: The pooling itself.
        gradient: From the gradient of the output and a tensor of the input's shape to that of the input.
    """

    x: Tensor
    pool: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DropoutCall:
    """Dropout in training mode with 0 < probability < 1."""

    x: Tensor
    probability: float


@dataclass(frozen=True)
class SmoothCall:
    """A smooth activation; ``in_place`` when the model itself asks for it."""

    x: Tensor
    kind: Smooth
    in_place: bool = False


@dataclass(frozen=True)
class LossCall:
    """A cross-entropy with class indices, summed up over samples or averaged.

    ``x`` are the scores, [N, classes] or [N, classes, ...].
    """

    x: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    mean: bool
    label_smoothing: float

    def lean(self, reduction: str, *, overwrite: bool = False, graph_only: bool = False) -> Tensor | None:
        """The loss by trady's own operation; ``None`` where PyTorch's is as good, or the only one that fits.

        ``overwrite`` where nobody else reads the scores, ``graph_only`` where nobody reads the loss.
        """
        if self.weight is not None or self.label_smoothing or not pays(self.x, self.target):
            return None
        index = self.ignore_index
        return row_losses(self.x, self.target, index, reduction, overwrite=overwrite, graph_only=graph_only)

    def total(self, *, overwrite: bool = False, graph_only: bool = False) -> Tensor:
        """The loss summed up, not averaged; for the options see :meth:`lean`."""
        total = self.lean("sum", overwrite=overwrite, graph_only=graph_only)
        if total is not None:
            return total
        return F.cross_entropy(
            self.x,
            self.target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def count(self) -> Tensor:
        """What an average divides by: the number of targets that count, or the sum of their weights."""
        counted = self.target != self.ignore_index
        if self.weight is None:
            return counted.sum()
        return self.weight[self.target.where(counted, 0)].mul(counted).sum()


Call = (
    WeightCall
    | RecurrentCall
    | NormCall
    | ActivationCall
    | PadCall
    | MaxPoolCall
    | AveragePoolCall
    | DropoutCall
    | SmoothCall
    | LossCall
)
