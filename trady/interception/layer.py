"""One layer whose input channels can train."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from trady.channels.table import Layer
from trady.errors import StateError
from trady.model.sharded import refuse_part
from trady.ops.selected import DenseWeight, Draw, SelectedChannels
from trady.optim.clipping import clip_by_output
from trady.quantized.linear import QuantizedLinear

#: Called with a layer's name and compact parameter when the gradient of its channels has arrived.
OnGradient = Callable[[str, nn.Parameter], None]


class ArmedLayer:
    """The channels of one layer that train now, and where their gradient goes.

    Args:
        layer: Its row of the channel table.
        model: The model that it belongs to.
        quantized: By the identity of a weight, the quantised layers of the model.
        on_gradient: Called when the gradient of its channels has arrived.

    Attributes:
        weight: The frozen weight.
        truth: What the trained channels are read from and written to: this weight, or of a quantised one the layer
            with its float channels.
        compact: What an optimizer updates, a leaf of the graph: the same object over all draws, of another shape.
        leaf: What gets the gradient of a forward pass: the compact parameter, or gates; ``None`` when nothing trains.
        selected: The channels; ``None`` when none trains.
    """

    __slots__ = (
        "__weakref__", "_attribute", "_bits", "_hook", "_on_gradient", "_owner", "_written", "compact", "leaf", "name",
        "selected", "truth", "weight",
    )  # fmt: skip

    def __init__(
        self,
        layer: Layer,
        model: nn.Module,
        quantized: dict[int, QuantizedLinear],
        on_gradient: Sequence[OnGradient],
    ) -> None:
        path, _, self._attribute = layer.parameter.rpartition(".")
        self._owner, self._on_gradient = model.get_submodule(path), on_gradient
        self.name, self.weight = layer.name, model.get_parameter(layer.parameter)
        self.truth: DenseWeight | QuantizedLinear
        self.truth = quantized.get(id(self.weight)) or DenseWeight(self.weight, layer.kind, layer.groups)
        self.compact = nn.Parameter(self.truth.empty())
        # It knows the layer weakly: a cycle would keep the memory of a tuner that nobody holds any more.
        known = weakref.ref(self)
        self._hook = self.compact.register_post_accumulate_grad_hook(
            lambda _: None if (found := known()) is None else found._arrived()
        )
        self.leaf: Tensor | None = None
        self.selected: SelectedChannels | None = None
        self._written = self._versions
        self._bits: int | Tensor = 0

    @property
    def _versions(self) -> tuple[int, int]:
        """How often compact parameter and weight have been written to."""
        return self.compact._version, self.truth.version

    def select(self, selected: SelectedChannels | None, *, by_output: bool) -> None:
        """Make these the channels that train.

        Args:
            selected: The channels; ``None`` is none.
            by_output: Whether gradients are clipped by output channel, since not all of them train.

        """
        if self.selected is not None and self.selected.draw is not None:
            self.selected.draw.over = True
        self.selected = None if selected is None else replace(selected, draw=Draw(self.name))
        self.compact.grad = None
        _forget_graphs(self.compact)
        self.compact.data = self.truth.empty() if selected is None else self.truth.gather(selected)
        clip_by_output(self.compact, by_output)
        self.leaf = None if selected is None else self.compact
        self._written = self._versions

    @property
    def is_replaced(self) -> bool:
        """Whether another tensor is in the weight's place, maybe for one call (``torch.func.functional_call``)."""
        return self._owner._parameters.get(self._attribute) is not self.weight

    @property
    def is_stale(self) -> bool:
        """Whether compact parameter or weight has been written to without the other.

        Raises:
            StateError: The weight was moved or replaced.
            ModelError: It is a part of itself now.

        """
        if self.selected is None:
            return False
        weight, compact = self.weight, self.compact
        if (placed := self._owner._parameters.get(self._attribute)) is not weight:
            refuse_part(self.name, placed)
        if placed is not weight or weight.device != compact.device:
            raise StateError(
                f"the weight of {self.name} was moved or replaced after the model had been prepared: "
                "do that first, then call trady.prepare and build the optimizer"
            )
        written = self._written
        return written[0] != compact._version or written[1] != self.truth.version

    def copy_over(self, write: Callable[[], None] | None = None) -> None:
        """Copy what :attr:`is_stale` has found to where it is missing; without gradients.

        Args:
            write: Writes the compact parameter into the weight, where somebody knows a quicker way.

        """
        assert self.selected is not None
        if self._written[0] == self.compact._version:
            self.compact.copy_(self.truth.gather(self.selected))
        elif write is not None:
            write()
        else:
            self.truth.scatter_(self.selected, self.compact.detach())
        self._written = self._versions

    def hear_last(self) -> None:
        """Be told of a gradient after everybody else: an optimizer may use it up then."""
        hooks = getattr(self.compact, "_post_accumulate_grad_hooks", None) or {}
        if len(hooks) > 1 and next(reversed(hooks)) != self._hook.id:
            hooks[self._hook.id] = hooks.pop(self._hook.id)

    def follow(self) -> None:
        """Let weight and compact parameter be the same where one of them was written to without a version: ``.data``.

        Called before a forward pass and before a step, once what has a version is in both.
        A weight that differs was written to, unless the compact parameter is not what it was. Versions stay where
        graphs may share the memory: they hold the values that it has.
        """
        if self.selected is None or not isinstance(self.truth, DenseWeight):
            return
        if self.compact.device.type == "cpu":
            self._follow_by_parts(self.selected, self.truth)
        else:
            self._follow_on_device(self.selected, self.truth)

    def _follow_by_parts(self, selected: SelectedChannels, truth: DenseWeight) -> None:
        """Compare a few channels at a time: a copy of all would be memory that no plan counts."""
        at_once = max(1, PART_BYTES * len(selected) // max(self.compact.nbytes, 1))
        followed, compact = False, self.compact.detach()
        for start in range(0, len(selected), at_once):
            rows = slice(start, start + at_once)
            whole = at_once >= len(selected)
            mine, now = compact[rows], truth.read(selected) if whole else truth.gather(selected, rows)
            if torch.equal(mine, now):
                continue
            if not followed and int(_bits(compact)) != self._bits:
                truth.scatter_(selected, compact)
                self._written = self._versions
                self.note()
                return
            with _unsafe_preserve_version_counter(self.compact):
                mine.copy_(now)
            followed = True
        if followed:
            self.note()

    def _follow_on_device(self, selected: SelectedChannels, truth: DenseWeight) -> None:
        """Decide on the device, which nobody waits for."""
        mine, now = self.compact.detach(), truth.gather(selected)
        with _unsafe_preserve_version_counter((self.compact, self.weight)):
            mine.copy_(torch.where(_bits(mine) != self._bits, mine, now))
            truth.scatter_(selected, mine)
        self.note()

    def note(self, bits: int | None = None) -> None:
        """Remember the bits of the compact parameter, their sum where it is known: they are those of the weight."""
        if bits is not None:
            self._bits = bits
        elif self.selected is not None and isinstance(self.truth, DenseWeight):
            found = _bits(self.compact.detach())
            if found.device.type == "cpu":
                self._bits = int(found)
            elif isinstance(self._bits, Tensor) and self._bits.device == found.device:
                self._bits.copy_(found)  # a recorded graph reads it where it was
            else:
                self._bits = found

    @contextmanager
    def gated(self, samples: int) -> Iterator[Tensor | None]:
        """Put gates (:mod:`trady.ops.gates`) in the place of the selected channels' weights for a while.

        Args:
            samples: Samples of the batches that follow.

        Yields:
            The gates ``[n, samples]``, which receive their gradient as leaves do; ``None`` if no channel trains.

        """
        leaf, selected, gates = self.leaf, self.selected, None
        if selected is not None:
            one = self.compact.detach().new_ones(())
            self.leaf = gates = one.expand(len(selected), samples).requires_grad_()
            self.selected = replace(selected, gates=samples)
        try:
            yield gates
        finally:
            self.leaf, self.selected = leaf, selected

    def _arrived(self) -> None:
        for callback in self._on_gradient:
            callback(self.name, self.compact)


#: Bytes of channels that are compared at once, on the CPU.
PART_BYTES = 1 << 14

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def as_whole_numbers(values: Tensor) -> Tensor:
    """The bits of values, in their memory."""
    return values.view(_WHOLE_NUMBERS[values.element_size()])


def _bits(values: Tensor) -> Tensor:
    """A sum over the bits of values: it differs where one of them was written to."""
    return as_whole_numbers(values).sum()


def _forget_graphs(leaf: nn.Parameter) -> None:
    """Let graphs that are still alive keep their own idea of a leaf: autograd remembers its shape with them.

    A new type makes it forget; the values are gone.
    """
    other = torch.float16 if leaf.dtype == torch.float32 else torch.float32
    before = leaf.dtype
    leaf.data = leaf.data.new_empty(0, dtype=other)
    leaf.data = leaf.data.new_empty(0, dtype=before)
