"""How the steps of a recurrent layer lie in memory, and in which order they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trady.ops.layout import CHUNK_BYTES


@dataclass(frozen=True)
class Steps:
    """How the steps of a recurrent layer follow each other.

    Attributes:
        cell: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        time: The dimension of the steps, 0 or 1; the other one is that of the sequences. ``None`` for a single step.
        reverse: Whether the last step comes first.
        sizes: For packed sequences, the number of sequences at every step; empty for others.
    """

    cell: str
    time: int | None = None
    reverse: bool = False
    sizes: tuple[int, ...] = ()

    def views(self, tensor: Tensor) -> Sequence[Tensor]:
        """The rows of every step, [sequences, features] each."""
        if self.sizes:
            return torch.split_with_sizes(tensor, self.sizes)
        return (tensor,) if self.time is None else tensor.unbind(self.time)

    def order(self, count: int) -> range:
        """The steps as they are computed."""
        return range(count)[::-1] if self.reverse else range(count)

    def before(self, views: Sequence[Tensor], start: Tensor, step: int) -> Tensor:
        """The state that a step begins with: that of the step computed before it, or ``start``."""
        rows, previous = views[step].shape[0], step + 1 if self.reverse else step - 1
        if not 0 <= previous < len(views):
            return start[:rows]
        found = views[previous]
        known = found.shape[0]
        if known < rows:  # packed and in reverse: shorter sequences begin here
            return torch.cat([found, start[known:rows]])
        return found if known == rows else found[:rows]

    def last(self, views: Sequence[Tensor]) -> Tensor:
        """The state of every sequence after its last step, in memory of its own."""
        if self.reverse or not self.sizes:
            return views[0 if self.reverse else -1].clone()
        ends = (*self.sizes[1:], 0)
        return torch.cat([view[end:] for view, end in zip(reversed(views), reversed(ends), strict=True)])

    def blocks(self, tensor: Tensor) -> list[Block]:
        """Cut into neighbouring steps of about :data:`CHUNK_BYTES` each, in the order of the backward pass."""
        sizes = self.sizes or (1,) * (1 if self.time is None else tensor.shape[self.time])
        rows_at_once = CHUNK_BYTES * sum(sizes) // max(1, tensor.nbytes)
        blocks, first, start, end = [], 0, 0, 0
        for step, rows in enumerate(sizes):
            if step > first and end + rows - start > rows_at_once:
                blocks.append(Block(self, range(first, step), slice(start, end)))
                first, start = step, end
            end += rows
        blocks.append(Block(self, range(first, len(sizes)), slice(start, end)))
        return blocks if self.reverse else blocks[::-1]


@dataclass(frozen=True)
class Block:
    """Neighbouring steps, and where they lie in the dimension of the steps."""

    steps: Steps
    members: range
    place: slice

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of these steps."""
        if self.steps.time is None and not self.steps.sizes:
            return tensor
        return tensor[:, self.place] if self.steps.time == 1 else tensor[self.place]

    def views(self, rows: Tensor) -> dict[int, Tensor]:
        """The rows of each step in what :meth:`of` has returned."""
        steps = replace(self.steps, sizes=self.steps.sizes[self.members.start : self.members.stop])
        return dict(zip(self.members, steps.views(rows), strict=True))

    @property
    def backward(self) -> range:
        """The steps in the order of the backward pass."""
        return self.members if self.steps.reverse else self.members[::-1]
