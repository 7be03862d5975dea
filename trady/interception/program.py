"""A segment of a model's calls, written down while the model runs, to be computed when it is complete.

While a segment is written down the model goes on with fake tensors, which take no memory; what they stand for exists
when the last call has come. The same program is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from trady.analysis.sample_axes import CallSamples
from trady.calls.autocast import cast
from trady.calls.canonical import untransposed
from trady.calls.recognize import run_on_meta
from trady.interception.written import Entry, Input, Sizes, Slot, WrittenWeight
from trady.model.batch import tensors_among, without_memory
from trady.model.structure import is_sparse
from trady.ops.context import autocast_dtype_on, real_type
from trady.ops.sample_axis import SampleAxis

_META = torch.device("meta")


class Program:
    """The calls of one segment in one forward pass.

    Args:
        samples: Where the samples lie in each call; empty if it cannot be computed in chunks.
        before: The program of the same segment in an earlier forward pass: as long as all is as it was then,
            its fake tensors serve again.

    Attributes:
        entries: The calls.
        inputs: The tensors from outside that they read.
        input_axes: Where the samples lie in those.
        input_layouts: Shape, strides and type of those.
        output_axes: By slot, where samples lie in what the program makes.
        batch: Samples in the batch, where it can be computed in chunks.
        full_batch: Whether it can only be computed on the full batch at once.
        device: Where it is computed.
        results: What the calls returned to the model, in fake tensors.
        fakes: By slot, the fake tensor that stands for what the program makes.
        held: By slot, the tensor with memory that the model holds instead.
        wanted: Slots of what is handed on, when it is complete.
        parameters: The parameters among its inputs, by place.
        devices: Where its inputs are.
        autocast: What it computes in under autocast.
        weights: By place, its weight layers.
        keeping: Places of calls whose backward pass reads inputs or result.
        loss: Whether its last call is a loss, which is summed up over samples; and whether that is averaged.
        draws: Whether random numbers are drawn.
        samples_at_once: Samples that are computed at a time.
        runners: How it is computed, by what trains.
    """

    def __init__(self, samples: tuple[CallSamples, ...], before: Program | None = None) -> None:
        self.samples = samples
        self.results: list[Any] = []
        self.input_layouts: list[tuple[Any, ...]] = []
        self._before = before
        self.entries: list[Entry] = []
        self.inputs: list[Tensor] = []
        self.input_axes: list[SampleAxis | None] = []
        self.output_axes: dict[int, SampleAxis | None] = {}
        self.batch = 0
        self.full_batch = not samples
        self.device: torch.device | None = None
        self.fakes: list[Tensor] = []
        self.held: dict[int, Tensor] = {}
        self._slots: dict[int, int] = {}
        self._twins: dict[int, Tensor] = {}
        self.wanted: tuple[int, ...] = ()
        self.parameters: dict[int, nn.Parameter] = {}
        self.devices: list[torch.device] = []
        self.autocast: torch.dtype | None = None
        self.weights: dict[int, WrittenWeight] = {}
        self.keeping: set[int] = set()
        self.loss: tuple[bool, bool] = False, False
        self.draws = False
        self.samples_at_once = 1
        self.runners: dict[Any, Any] = {}

    # -- writing down --------------------------------------------------------------------------------

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for something that the program makes."""
        return id(tensor) in self._slots

    def skip(self) -> None:
        """Leave the place of a call empty that does not belong to the program."""
        self.entries.append(Entry(None, (), {}, ()))
        self.results.append(None)

    def axis_now(self, tensor: Tensor, axis: SampleAxis | None) -> SampleAxis | None:
        """Where samples lie in a tensor of this batch, whose samples may have other sizes than the traced ones."""
        if axis is None or self.full_batch:
            return None
        size = tensor.shape[axis.dim] if axis.dim < tensor.dim() else 0
        if size == 1 < self.batch:
            return None  # the same for all samples
        batch = self.batch or size // axis.per_sample
        if batch and size % batch == 0 and (axis.per_sample > 1 or size == batch):
            self.batch = batch
            return SampleAxis(axis.dim, size // batch)
        self.full_batch = True
        return None

    def write(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        held: Iterable[int] = (),
        given: Mapping[int, Tensor] | None = None,
    ) -> Any:
        """Add a call; return fake tensors in place of its results.

        Args:
            function: The torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            held: Places among its results of tensors that the model goes on holding when the segment has
                ended: they have memory from the start.
            given: By slot, those tensors where they are there already.

        """
        index = len(self.entries)
        reader = _Reader(self, self.samples[index] if self.samples else None)
        entry = Entry(function, reader.read(args), reader.read(kwargs), ())
        self.input_layouts += [layout_of(tensor) for tensor in self.inputs[len(self.input_layouts) :]]
        out = self._as_before(entry) if self._before is not None else None
        if out is None:
            self._before = None
            out = self._fake_run(function, args, kwargs)
        self.results.append(out)
        outputs = []
        for place, tensor in enumerate(t for t in tree_iter(out) if isinstance(t, Tensor)):
            slot = self._slots.get(id(tensor))
            if slot is None:
                slot = self._slots[id(tensor)] = len(self.fakes)
                self.fakes.append(tensor)
                known = self.samples[index].outputs if self.samples else ()
                self.output_axes[slot] = self.axis_now(tensor, known[place] if place < len(known) else None)
            if place in held and slot not in self.held:
                real = real_in_place_of(tensor, self.device) if given is None else given[slot]
                self.held[slot] = real
                self._slots[id(real)], self._twins[id(real)] = slot, tensor
            outputs.append(slot)
        entry.outputs, entry.reads = tuple(outputs), tuple(reader.reads)
        self.entries.append(entry)
        return tree_map(self._as_held, out) if self.held else out

    def _as_before(self, entry: Entry) -> Any:
        """What stood for the result of this call in the forward pass before; ``None`` if something differs."""
        index, before = len(self.entries), self._before
        assert before is not None
        if index >= len(before.entries) or self.input_layouts != before.input_layouts[: len(self.input_layouts)]:
            return None
        then = before.entries[index]
        same = then.function == entry.function and then.args == entry.args and then.kwargs == entry.kwargs
        return before.results[index] if same else None

    def _fake_run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self.device or next((t.device for t in tensors_among((*args, *kwargs.values()))), _META)
        dtype = autocast_dtype_on(device)
        with _disable_current_modes():  # nobody is to count what takes no memory
            args, kwargs = self._without_memory(args), self._without_memory(kwargs)
            if dtype is not None:
                args, kwargs = cast(function, args, kwargs, dtype, real_type(device))
            return run_on_meta(function, args, kwargs)

    def _as_held(self, value: Any) -> Any:
        slot = self._slots.get(id(value)) if isinstance(value, Tensor) else None
        return value if slot is None else self.held.get(slot, value)

    def _without_memory(self, value: Any) -> Any:
        """The same arguments with tensors, and devices, that take no memory."""
        if isinstance(value, Tensor):
            twin = self._twins.get(id(value))
            if twin is None and id(value) in self._slots:
                return value
            if twin is None:
                twin = without_memory(value)
                self._twins[id(value)] = twin
            return twin
        if isinstance(value, torch.device):
            return _META
        if type(value) in (tuple, list):
            return type(value)([self._without_memory(v) for v in value])
        if isinstance(value, dict):
            return {k: self._without_memory(v) for k, v in value.items()}
        return value

    def close(self, wanted: list[tuple[int, int]]) -> tuple[int, ...]:
        """End writing; return the slots of what is wanted, given as pairs of call and place."""
        slots = tuple(self.entries[call].outputs[place] for call, place in wanted)
        last: dict[int, int] = {}
        for index, entry in enumerate(self.entries):
            last.update(dict.fromkeys((*entry.reads, *entry.outputs), index))
        gone: dict[int, list[int]] = {}
        for slot, index in last.items():
            if slot not in slots:
                gone.setdefault(index, []).append(slot)
        for index, last_read in gone.items():
            self.entries[index].gone = tuple(last_read)
        self.wanted = slots
        return slots

    def let_go(self) -> None:
        """Drop the tensors from outside but parameters: they are handed in from now on."""
        self.parameters = {i: t for i, t in enumerate(self.inputs) if isinstance(t, nn.Parameter)}
        self.devices = [tensor.device for tensor in self.inputs]
        self._slots.clear()
        self.held = {}
        self._twins.clear()
        self.inputs = []
        self._before = None


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, strides and type of a tensor."""
    return tensor.shape, tensor.layout if is_sparse(tensor) else tensor.stride(), tensor.dtype


def _constant(tensor: Tensor, traced: tuple[int, ...] | None) -> bool:
    """Whether a tensor has no dimension that may be one of samples, where the traced one had none."""
    if isinstance(untransposed(tensor), nn.Parameter):
        return True
    known = traced is not None and len(traced) == tensor.dim()
    return known and all(now <= 1 or then > 1 for now, then in zip(tensor.shape, traced or (), strict=True))


class _Reader:
    """Replaces the tensors and sizes among the arguments of one call, in the order of the trace."""

    def __init__(self, program: Program, samples: CallSamples | None) -> None:
        self._program = program
        known = zip(samples.inputs, samples.shapes, strict=True) if samples is not None else ()
        self._tensors: Iterator[tuple[SampleAxis | None, tuple[int, ...]]] = iter(known)
        self._numbers: Iterator[bool] = iter(samples.numbers if samples is not None else ())
        self.reads: list[int] = []

    def read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return self._number(value)
        if isinstance(value, (tuple, list)):
            read = [self.read(v) for v in value]
            return read if isinstance(value, list) else tuple(read)
        if isinstance(value, dict):
            return {k: self.read(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.read(value.start), self.read(value.stop), self.read(value.step))
        return value

    def _tensor(self, tensor: Tensor) -> Slot | Input:
        program = self._program
        axis, shape = next(self._tensors, (None, None))
        if axis is None and not _constant(tensor, shape):
            program.full_batch = True  # in the trace it did not depend on the sample, maybe it does now
        slot = program._slots.get(id(tensor))
        if slot is not None:
            self.reads.append(slot)
            return Slot(slot)
        axis = program.axis_now(tensor, axis)
        for index, known in enumerate(program.inputs):
            if known is tensor:
                return Input(index, program.input_axes[index])
        if program.device is None or isinstance(tensor, nn.Parameter):
            program.device = tensor.device
        program.inputs.append(tensor)
        program.input_axes.append(axis)
        return Input(len(program.inputs) - 1, axis)

    def _number(self, number: int) -> int | Sizes:
        grows = next(self._numbers, False)
        if not grows or number < 0:
            return number
        batch = self._program.batch
        if not batch or number % batch:
            self._program.full_batch = True
            return number
        return Sizes(number // batch)


def real_in_place_of(fake: Tensor, device: torch.device | None) -> Tensor:
    """Memory for what a fake tensor stands for."""
    return torch.empty(fake.shape, dtype=fake.dtype, device=device)
