"""Cross-entropies with class indices, which keep one number a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trady.calls.handling import Handling, labelled
from trady.calls.kind import Call, CallKind, Keeps
from trady.calls.sample_rules import SampledCall
from trady.ops.loss import pays, row_losses


@dataclass(frozen=True)
class LossCall(Call):
    """A cross-entropy with class indices, summed up over samples or averaged.

    ``x`` are the scores, [N, classes] or [N, classes, ...].
    """

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


def _read(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossCall | None:
    plain = size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or target.is_floating_point() or input.dim() < 2:
        return None
    return LossCall(input, target, weight, ignore_index, reduction == "mean", label_smoothing)


def _by_sample(sampled: SampledCall) -> bool:
    scores, target = sampled.input_axes[:2]
    return scores is not None and scores == target and scores.dim == 0


def _compute(call: LossCall, handling: Handling) -> Tensor | None:
    with labelled("cross_entropy"):
        return call.lean("mean" if call.mean else "sum")


LOSS = CallKind(
    LossCall,
    readers={F.cross_entropy: _read},
    keeps=lambda call: Keeps.INPUTS,
    handler=_compute,
    samples=_by_sample,
    sums_samples=True,
    activations=("x", "target"),
)
