"""What was estimated: a row a method, as values, JSON and a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from trady.errors import TradyError
from trady.records.files import write_json
from trady.records.schema import Natural, Positive
from trady.records.versioned import Format
from trady.report.units import format_bytes

_FORMAT = Format("trady fit", "estimate of trady fit", TradyError, "run trady fit again")

#: No batch is looked for beyond this.
MOST_SAMPLES = 8192

#: No sequence of a model that does not say how long they may be is looked for beyond this.
MOST_TOKENS = 131072


@dataclass(frozen=True)
class MethodFit:
    """What a step of one method takes.

    Attributes:
        method: Its name, as it is asked for.
        title: For people.
        note: What a reader should know: where adapters stand, what is recomputed.
        refused: Why there is no figure; ``None`` where there is one.
        trainable_parameters: Elements that get a gradient.
        peak_bytes: The most tensor memory of a training step, weights, batch and optimizer state included.
        parts: What that peak is made of, named as in the ledger.
        evaluation_bytes: The peak of a pass without gradients on the same batch, weights and optimizer state included.
        largest_batch: Samples of the asked length that fit in the memory; 0 if none; ``None`` if there is no memory.
        longest_sequence: Tokens that fit in the memory with the asked batch; 0 if none; ``None`` if there is no memory
            or the model reads no tokens.
        budget_bytes: TraDy's ``peak:`` budget.
        channels: Input channels that TraDy trains.
        channel_share: Those of all input channels.
    """

    method: str
    title: str
    note: str = ""
    refused: str | None = None
    trainable_parameters: Natural = 0
    peak_bytes: Natural = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    evaluation_bytes: Natural = 0
    largest_batch: Natural | None = None
    longest_sequence: Natural | None = None
    budget_bytes: Natural | None = None
    channels: Natural | None = None
    channel_share: float | None = None


@dataclass(frozen=True)
class FitReport:
    """What training a model takes by several methods, and what fits.

    Attributes:
        model: As it was named, or its class.
        parameters: Elements of its parameters.
        weight_bytes: Its parameters and buffers, in the dtype of the report.
        dtype: Of the weights.
        batch_size: Samples of a step.
        length: Tokens of a sequence; ``None`` for a model of something else.
        image_size: Height and width of an image; ``None`` for a model of something else.
        optimizer: Its name.
        autocast: What products are computed in under autocast; ``None`` is without it.
        device: Whose optimizer steps are assumed: ``cpu`` or ``cuda``.
        memory_bytes: What a step may take; ``None`` where that was not asked.
        rows: The methods, in the order that was asked for.
        complete: Whether all methods that were asked for are there; an interrupt leaves the first of them.
    """

    model: str
    parameters: Natural
    weight_bytes: Natural
    dtype: str
    batch_size: Positive
    length: Positive | None
    image_size: Positive | None
    optimizer: str
    autocast: str | None
    device: str
    memory_bytes: Natural | None
    rows: tuple[MethodFit, ...] = ()
    complete: bool = True

    def __getitem__(self, method: str) -> MethodFit:
        """Return the first row of a method.

        Raises:
            KeyError: It is not among them.
        """
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(method)

    def fits(self, row: MethodFit) -> bool | None:
        """Whether a row's step fits in the memory; ``None`` where that was not asked, or there is no figure."""
        if self.memory_bytes is None or row.refused is not None:
            return None
        return row.peak_bytes <= self.memory_bytes

    @property
    def advice(self) -> str | None:
        """What fits, where the asked batch does not by any method; ``None`` where it does, or no memory was given."""
        told = [row for row in self.rows if row.refused is None]
        if self.memory_bytes is None or not told or any(map(self.fits, told)):
            return None
        memory, weights = format_bytes(self.memory_bytes), format_bytes(self.weight_bytes)
        least = min(told, key=lambda row: row.peak_bytes)
        text = f"Nothing fits in {memory} with this batch; {least.title} takes least, {format_bytes(least.peak_bytes)}."
        if self.weight_bytes > self.memory_bytes:
            text = f"The weights alone take {weights} in {self.dtype}, more than {memory}. " + text
        smaller = [row for row in told if row.largest_batch]
        if smaller:
            best = max(smaller, key=lambda row: row.largest_batch or 0)
            return f"{text} {best.title} fits with a batch of {best.largest_batch}."
        return (
            f"{text} Not even one sample fits by any of these methods: a smaller model, a shorter length, "
            "--dtype bfloat16 or qlora-checkpoint may."
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from trady.estimates.table import view  # the table knows the report

        yield from view(self, console, options)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_json` takes them, with whether each fits beside them."""
        rows = [{**asdict(row), "parts": dict(row.parts), "fits": self.fits(row)} for row in self.rows]
        return {**_FORMAT.header(), **asdict(self), "rows": rows, "advice": self.advice}

    @classmethod
    def from_json(cls, data: Any) -> FitReport:
        """The report of :meth:`to_json`.

        Raises:
            TradyError: The data are no such report's.
        """
        return _FORMAT.read(cls, data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file of that name is replaced completely or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FitReport:
        """Read what :meth:`save` wrote.

        Raises:
            TradyError: The file cannot be read, or is no such report.
        """
        return _FORMAT.load(path, cls.from_json)
