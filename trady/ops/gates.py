"""Gates: a factor of 1 for every input channel and sample, whose gradient is wanted instead of the weights'.

With ``a`` the input of a layer, ``m`` its gates and ``L`` the sum of the samples' losses,

    y = f(m · a),    ∂L/∂m[c, n] = Σ_positions a[n, c] · ∂L/∂a[n, c]

through this layer alone. Activation Fisher information (TinyTrain, arXiv 2307.09988) is computed from these.
"""

# N samples, R rows of the input (R / N a sample), C input channels, n of them with gates, P positions.

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trady.errors import ModelError
from trady.ops.context import samples_under_way
from trady.ops.layout import take
from trady.ops.selected import SelectedChannels


class NotBySampleError(ModelError):
    """The rows of a layer's input are not the samples, nor the same number of rows for each sample."""


@dataclass(frozen=True)
class Gates:
    """Where the samples lie in the input of one call.

    Attributes:
        index: int64 [n], the channels that have gates.
        channel_dim: Dimension of the channels in the input.
        first: The first sample of the input.
        rows: Rows of a sample, which follow each other in the first dimension.
    """

    index: Tensor
    channel_dim: int
    first: int
    rows: int

    @classmethod
    def of(cls, selected: SelectedChannels, samples: int, rows: int, channel_dim: int) -> Gates:
        """Find the samples in an input of ``rows`` rows.

        Raises:
            NotBySampleError: The rows cannot be those of the samples.

        """
        first, count = samples_under_way.get() or (0, samples)
        if rows % count:
            raise NotBySampleError(f"a layer's input has {rows} rows, which is not a multiple of {count} samples")
        return cls(selected.index, channel_dim, first, rows // count)

    def add_gradient(self, total: Tensor, gradient: Tensor, inputs: Tensor, rows: slice) -> None:
        """Add the gradient of the gates to ``total``, sample by sample, so that only one sample is copied at a time.

        Args:
            total: ``[n, samples]``.
            gradient: Of some rows of the layer's input, all of its channels.
            inputs: The gated channels of the layer's input, all rows.
            rows: Which rows.

        """
        start = rows.start or 0
        end = start + gradient.shape[0]
        for sample in range(start // self.rows, -(-end // self.rows)):
            first, last = max(start, sample * self.rows), min(end, (sample + 1) * self.rows)
            product = take(gradient[first - start : last - start], self.channel_dim, self.index)
            sums = product.mul_(inputs[first:last]).movedim(self.channel_dim, 0).flatten(1).sum(1, dtype=total.dtype)
            total[:, self.first + sample].add_(sums)
