"""The ledger: where the tensor memory of a training step goes, measured."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from trady.errors import TradyError
from trady.memory.recorder import PARTS, Recorder
from trady.memory.saved import Saved
from trady.process.ranks import Traffic
from trady.records.files import write_json
from trady.records.translated import file_errors
from trady.records.versioned import Format
from trady.report.units import format_bytes

_FORMAT = Format("trady ledger 1", "ledger", TradyError, "measure again", version=None)


@dataclass(frozen=True)
class Ledger:
    """The tensor memory of one training step, in bytes.

    All figures count storages that PyTorch's operations read and wrote (labels count from when the loss reads
    them), and on CUDA the workspaces that cuBLAS keeps. What a kernel borrows for a moment is in
    ``allocator_peak_bytes`` alone. Papers on memory often state peaks without weights and batch: those are the
    ``working_…`` figures.

    Attributes:
        peak_bytes: The most bytes alive at one time in the step, weights and batch included.
        weight_bytes: Parameters and buffers of the model.
        input_bytes: The batch, as the model received it.
        inference_peak_bytes: The same for one pass of the untouched model in eval mode without
            gradients; ``None`` if it was not or could not be measured.
        saved: What autograd kept between forward and backward, largest first: storages that are
            not parameters or buffers, each once, summed over all forwards of the step.
        gradient_bytes: All ``.grad`` together, at their peak.
        optimizer_state_bytes: State of the optimizers that stepped, at its peak.
        parts: What the peak consisted of, at that moment; sums to ``peak_bytes``.
        allocator_peak_bytes: On CUDA, the peak of the caching allocator in the step.
        remarks: What could not be measured, and why.
        averaged_bytes: Bytes of gradients that were averaged over processes, each counted as often as it was.
        averaging_calls: Collectives that it took.
    """

    peak_bytes: int
    weight_bytes: int
    input_bytes: int
    inference_peak_bytes: int | None
    saved: tuple[Saved, ...]
    gradient_bytes: int
    optimizer_state_bytes: int
    parts: Mapping[str, int]
    allocator_peak_bytes: int | None = None
    remarks: tuple[str, ...] = ()
    averaged_bytes: int = 0
    averaging_calls: int = 0

    @property
    def peak_without_weights_bytes(self) -> int:
        """The peak less the model's weights."""
        return self.peak_bytes - self.weight_bytes

    @property
    def inference_peak_without_weights_bytes(self) -> int | None:
        """The inference peak less the model's weights."""
        return None if self.inference_peak_bytes is None else self.inference_peak_bytes - self.weight_bytes

    @property
    def working_peak_bytes(self) -> int:
        """The peak less weights and batch."""
        return self.peak_bytes - self.weight_bytes - self.input_bytes

    @property
    def inference_working_peak_bytes(self) -> int | None:
        """The inference peak less weights and batch."""
        without_weights = self.inference_peak_without_weights_bytes
        return None if without_weights is None else without_weights - self.input_bytes

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd kept between forward and backward."""
        return sum(saved.bytes for saved in self.saved)

    def averaging(self, traffic: Traffic) -> Ledger:
        """The same with what the step has averaged over processes."""
        return replace(self, averaged_bytes=traffic.nbytes, averaging_calls=traffic.calls)

    def saved_bytes_of(self, kind: str) -> int:
        """Bytes kept of one kind: ``activations``, ``channels``, ``bits`` or ``indices``."""
        return sum(saved.bytes for saved in self.saved if saved.kind == kind)

    def table(self, rows: int = 12) -> RenderableType:
        """The ledger for people, to print with rich.

        Args:
            rows: How many of the largest savers to show.
        """
        return Group(self._peaks(), self._savers(rows), *map(escape, self.remarks))

    def __rich__(self) -> RenderableType:
        return self.table()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self.table())
        return text.getvalue().rstrip("\n")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_json` takes them, with the totals beside them."""
        averaged = ("averaged_bytes", "averaging_calls")  # of several processes
        return {
            **_FORMAT.header(),
            **{name: value for name, value in asdict(self).items() if name not in averaged or value},
            "saved": [asdict(saved) for saved in self.saved],
            "parts": dict(self.parts),
            "remarks": list(self.remarks),
            "saved_bytes": self.saved_bytes,
        }

    @classmethod
    def from_json(cls, data: Any) -> Ledger:
        """The ledger of :meth:`to_json`.

        Raises:
            TradyError: If the data are not a ledger's.
        """
        return _FORMAT.read(cls, data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file of that name is replaced completely or not at all."""
        with file_errors():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what :meth:`save` wrote.

        Raises:
            TradyError: If the file cannot be read, or is not a ledger.
        """
        return _FORMAT.load(path, cls.from_json)

    def _peaks(self) -> Table:
        table = Table("at the peak", title="Tensor memory of a training step", title_justify="left")
        table.add_column("", justify="right")
        for part, amount in self.parts.items():
            if amount:
                table.add_row(escape(part), format_bytes(amount))
        table.add_section()
        table.add_row("peak", format_bytes(self.peak_bytes), style="bold")
        if self.inference_peak_bytes:
            ratio = f"{self.peak_bytes / self.inference_peak_bytes:.2f} ×"
            table.add_row("inference peak of the untouched model", format_bytes(self.inference_peak_bytes))
            table.add_row("training / inference", ratio)
        if self.inference_working_peak_bytes:
            working = format_bytes(self.working_peak_bytes)
            ratio = f"{self.working_peak_bytes / self.inference_working_peak_bytes:.2f} ×"
            inference = format_bytes(self.inference_working_peak_bytes)
            table.add_row("without weights and batch", f"{working} / {inference} = {ratio}")
        if self.allocator_peak_bytes is not None:
            table.add_row("peak of the CUDA allocator", format_bytes(self.allocator_peak_bytes))
        if self.averaging_calls:
            table.add_row(f"averaged over processes, calls: {self.averaging_calls}", format_bytes(self.averaged_bytes))
        return table

    def _savers(self, rows: int) -> Table:
        title = f"Kept between forward and backward: {format_bytes(self.saved_bytes)}"
        table = Table(title=title, title_justify="left")
        for column in ("layer", "operation", "kind"):
            table.add_column(column, overflow="fold")
        table.add_column("tensors", justify="right")
        table.add_column("bytes", justify="right")
        for saved in self.saved[:rows]:
            size = format_bytes(saved.bytes)
            table.add_row(*map(escape, (saved.layer, saved.operation, saved.kind)), str(saved.tensors), size)
        if rest := self.saved[rows:]:
            tensors, remaining = sum(entry.tensors for entry in rest), sum(entry.bytes for entry in rest)
            table.add_row(f"({len(rest)} more)", "", "", str(tensors), format_bytes(remaining))
        return table


def measure(
    step: Callable[[], object],
    model: nn.Module | None = None,
    *,
    inference: bool = True,
    untouched: Callable[[], AbstractContextManager[object]] = nullcontext,
    compact: Iterable[Tensor] = (),
    early: Iterable[Optimizer] = (),
) -> Ledger:
    """Run one training step and account for its tensor memory.

    The step trains: it runs once, as it would without a ledger. The state of an optimizer is counted if that
    optimizer steps in it.

    Args:
        step: Forward, backward and, as wanted, the optimizer's step and ``zero_grad``.
        model: The model that is trained; by default the module with the most parameters
            among those that the step calls.
        inference: Whether to run the model once more, as an inference pass, on the step's
            batch. Floating-point inputs that are gone by then are replaced by zeros.
        untouched: Makes the context for that pass, in which the model is as its author wrote it.
        compact: Leaf tensors that are trained in place of channels of the model's weights;
            their gradients are ``compact gradients``.
        early: Optimizers that update before their ``step()`` (:mod:`trady.optim`): their state counts from the
            start, not from the first update that reads it.

    Returns:
        The ledger. What could not be measured is in its ``remarks``.

    Raises:
        Exception: Whatever the step raises; no hooks stay behind.
    """
    recorder = Recorder(model, compact, early)
    with recorder:
        step()
    return _ledger(recorder, recorder.inference_peak(untouched) if inference else None)


def _ledger(recorder: Recorder, inference_peak: int | None) -> Ledger:
    peak, parts = recorder.peak()
    amounts: Counter[tuple[str, str, str]] = Counter()
    tensors: Counter[tuple[str, str, str]] = Counter()
    for saver, nbytes in recorder.savers():
        amounts[saver] += nbytes
        tensors[saver] += 1
    saved = (Saved(*saver, amount, tensors[saver]) for saver, amount in amounts.items())
    return Ledger(
        peak_bytes=peak,
        weight_bytes=recorder.weight_bytes(),
        input_bytes=recorder.highest("inputs"),
        inference_peak_bytes=inference_peak,
        saved=tuple(sorted(saved, key=lambda entry: -entry.bytes)),
        gradient_bytes=recorder.highest("gradients", "compact gradients"),
        optimizer_state_bytes=recorder.highest("optimizer state"),
        parts={part: parts.get(part, 0) for part in PARTS},
        allocator_peak_bytes=recorder.allocator_peak_bytes,
        remarks=tuple(recorder.remarks),
    )
