"""The selected channels of one layer, as the gradient kernels take them."""

# n selected input channels, m selected output channels, G groups: W is [O, C / G, *kernel], its channel-major view
# [G, C / G, O / G, *kernel], selected slices are [n, O / G or m, *kernel].

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trady.errors import StateError

#: Indices of channels, sorted.
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Groups of a convolution with the same number of selected channels: one dense grouped convolution.

    Attributes:
        positions: Which of the selected channels belong here, in order; ``None`` for all.
        groups: Indices of the groups; ``None`` for all groups of the layer.
        group_count: Number of these groups.
        channels_a_group: Selected channels in each of them.
    """

    positions: Tensor | None
    groups: Tensor | None
    group_count: int
    channels_a_group: int


@dataclass(eq=False)
class Draw:
    """The draw that channels were selected in.

    Attributes:
        layer: Name of the layer.
        over: Whether other channels train by now.
    """

    layer: str
    over: bool = False


@dataclass(frozen=True)
class SelectedChannels:
    """Sorted input channels of one layer, how they fall into its groups, and which output channels train.

    Attributes:
        index: int64 [n], the channels.
        group: int64 [n], the group each is read by.
        channel: int64 [n], its place inside that group.
        blocks: The groups by number of selected channels: at most sqrt(2 n) of them.
        outputs: int64 [m], the output channels that train; ``None`` for all. Only in layers with one group.
        gates: Samples of the batch where the layer's leaf holds gates ``[n, samples]`` instead of weights (factors
            of 1 on the input, :mod:`trady.ops.gates`); ``None`` elsewhere.
        draw: What tells one draw from the next.
    """

    index: Tensor
    group: Tensor
    channel: Tensor
    blocks: tuple[Block, ...]
    outputs: Tensor | None = None
    gates: int | None = None
    draw: Draw | None = None

    def check_current(self) -> None:
        """Refuse a gradient of channels that train no more: the leaf that would get it holds others by now.

        Raises:
            StateError: Channels were drawn again since the forward pass.
        """
        if self.draw is not None and self.draw.over:
            raise StateError(
                f"a backward pass reached {self.draw.layer} after its channels were drawn again: run backward() before "
                "resample(), and before the optimizer step of another batch"
            )

    @property
    def place(self) -> tuple[Tensor, ...]:
        """Index of the selected slices in the view of :func:`channel_major`."""
        return self.place_of(slice(None))

    def place_of(self, rows: slice) -> tuple[Tensor, ...]:
        """The same of some of the channels."""
        group, channel = self.group[rows], self.channel[rows]
        if self.outputs is None:
            return group, channel
        return group.unsqueeze(1), channel.unsqueeze(1), self.outputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All indices that are kept."""
        blocks = (tensor for block in self.blocks for tensor in (block.positions, block.groups))
        return tuple(t for t in (self.index, self.group, self.channel, self.outputs, *blocks) if t is not None)

    def __len__(self) -> int:
        return self.index.shape[0]


def select_channels(
    channels: Indices,
    groups: int,
    channels_a_group: int,
    device: torch.device,
    outputs: Indices | None = None,
) -> SelectedChannels:
    """Prepare sorted channel indices of a layer with ``groups * channels_a_group`` input channels."""
    tensor = partial(numbers_on, device)
    index, chosen = tensor(channels.copy()), None if outputs is None else tensor(outputs.copy())
    if groups == 1:  # the group of all is 0, and the place in it is the channel
        zeros = tensor(np.zeros(1, dtype=np.int64)).expand(len(channels))
        return SelectedChannels(index, zeros, index, (Block(None, None, 1, len(channels)),), chosen)
    group, channel = np.divmod(channels, channels_a_group)
    return SelectedChannels(index, tensor(group), tensor(channel), _blocks(group, groups, device), chosen)


def _blocks(group: Indices, groups: int, device: torch.device) -> tuple[Block, ...]:
    """The groups that channels fall into, by number of channels."""
    counts = np.bincount(group, minlength=groups)
    blocks = []
    for count in np.unique(counts[counts > 0]):
        members = np.flatnonzero(counts == count)
        inside = np.flatnonzero(counts[group] == count)
        blocks.append(
            Block(
                positions=None if len(inside) == len(group) else numbers_on(device, inside),
                groups=None if len(members) == groups else numbers_on(device, members),
                group_count=len(members),
                channels_a_group=int(count),
            )
        )
    return tuple(blocks)


def numbers_on(device: torch.device, values: Indices) -> Tensor:
    """Copy indices to a device without waiting for what it is doing."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def channel_major(weight: Tensor, kind: str, groups: int) -> Tensor:
    """View a weight as [groups, input channels a group, output channels a group, *kernel]."""
    if kind == "addmm":
        return weight.unsqueeze(0)
    view: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return view


def channel_dim(weight: Tensor, kind: str, groups: int, selected: SelectedChannels) -> int | None:
    """The dimension of a weight along which the selected slices lie; ``None`` where it is not a single one."""
    if selected.outputs is not None or not weight.is_contiguous():
        return None
    if kind == "addmm":
        return 0
    if groups == 1:
        return 1
    return 0 if weight.shape[0] == groups and weight.shape[1] == 1 else None


def read_channels(weight: Tensor, kind: str, groups: int, selected: SelectedChannels) -> Tensor:
    """Copy the selected slices as :func:`gather_channels` does, in whichever order of memory is the fastest."""
    dim = channel_dim(weight, kind, groups, selected)
    if dim is None:
        return gather_channels(weight, kind, groups, selected)
    rows = weight.index_select(dim, selected.index)
    return rows.transpose(0, 1) if dim else rows


def gather_channels(weight: Tensor, kind: str, groups: int, selected: SelectedChannels) -> Tensor:
    """Copy the selected slices ``W[:, c]``: [n, selected output channels a group, *kernel]."""
    rows: Tensor = channel_major(weight, kind, groups)[selected.place]
    return rows


def scatter_channels_(weight: Tensor, kind: str, groups: int, selected: SelectedChannels, values: Tensor) -> None:
    """Write slices of :func:`gather_channels` back into ``weight``."""
    dim = channel_dim(weight, kind, groups, selected)
    if dim is None:
        channel_major(weight, kind, groups)[selected.place] = values.to(weight.dtype)
    else:
        weight.index_copy_(dim, selected.index, (values.transpose(0, 1) if dim else values).to(weight.dtype))


@dataclass(frozen=True)
class DenseWeight:
    """A plain weight whose channels are read and written."""

    weight: Tensor
    kind: str
    groups: int

    @property
    def version(self) -> int:
        """How often it has been written to."""
        return self.weight._version

    def dense(self) -> Tensor:
        """The weight itself."""
        return self.weight.detach()

    def empty(self) -> Tensor:
        """No channel: [0, output channels a group, *kernel]."""
        return self.weight.detach().new_empty((0, *channel_major(self.dense(), self.kind, self.groups).shape[2:]))

    def gather(self, selected: SelectedChannels, rows: slice = slice(None)) -> Tensor:
        """Copy the selected slices, or some of them."""
        view = channel_major(self.dense(), self.kind, self.groups)
        found: Tensor = view[selected.place_of(rows)]
        return found

    def read(self, selected: SelectedChannels) -> Tensor:
        """Copy the selected slices, in any order of memory."""
        return read_channels(self.weight.detach(), self.kind, self.groups, selected)

    def scatter_(self, selected: SelectedChannels, values: Tensor) -> None:
        """Write slices of :meth:`gather` back."""
        scatter_channels_(self.dense(), self.kind, self.groups, selected, values)
