"""How a run shows its progress: a live line for people, one line an epoch for logs, or nothing."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trady.planning.budget import Budget
from trady.planning.process_memory import is_process
from trady.report.units import format_bytes
from trady.training.metrics import EpochMetrics


class Display(Protocol):
    """What the loop reports its progress to."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Report that an epoch of ``steps`` steps begins."""

    def observing(self, epoch: int, epochs: int, passes: int) -> None:
        """Report the passes done so far to measure what a policy draws from; called before ``start_epoch``."""

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        """Report a step: mean loss of the epoch so far, speed, measured peak."""

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Report the end of an epoch."""

    def close(self) -> None:
        """Clear the live line."""


class Silent:
    """Shows nothing."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Show nothing."""

    def observing(self, epoch: int, epochs: int, passes: int) -> None:
        """Show nothing."""

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        """Show nothing."""

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing is open."""


class Lines:
    """One line an epoch; on a terminal also a live line during the epoch."""

    def __init__(
        self,
        title: str,
        budget_bytes: int | None,
        console: Console | None = None,
        *,
        process_budget_bytes: int | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.title = title
        self.budget = f" of {format_bytes(budget_bytes)}" if budget_bytes else ""
        self.process_budget = f" of {format_bytes(process_budget_bytes)}" if process_budget_bytes else ""
        self.accuracy = ""
        self.epochs = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def observing(self, epoch: int, epochs: int, passes: int) -> None:
        """Count the passes on a live line."""
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(TextColumn("{task.description}", markup=False), console=self.console, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        self._bar.update(self._task, description=f"{self.title} epoch {epoch + 1}/{epochs}: observing, {passes} passes")

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Open the live line."""
        self.close()
        self.epochs = epochs
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=True,
        )
        label = f"{self.title} epoch {epoch + 1}/{epochs}"
        self._task = self._bar.add_task(label, total=steps, figures="")
        self._bar.start()

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        """Move the live line."""
        if self._bar is not None:
            figures = (
                f"loss {loss:.3f} {self.accuracy} {samples_per_second:.0f}/s "
                f"peak {format_bytes(peak_bytes)}{self.budget}"
            )
            self._bar.update(self._task, advance=1, figures=figures)

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Print the epoch's line."""
        self.close()
        self.accuracy = str(metrics)
        process = ""
        if metrics.process_peak_bytes is not None:
            process = f", process {format_bytes(metrics.process_peak_bytes)}{self.process_budget}"
        self.console.print(
            f"{self.title} epoch {metrics.epoch + 1}/{self.epochs}: loss {metrics.train_loss:.3f}, "
            f"{self.accuracy}, {metrics.samples_per_second:.0f} samples/s, "
            f"peak {format_bytes(metrics.peak_bytes)}{self.budget}{process}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Several:
    """Shows the same in several places, such as a terminal and a log file.

    Args:
        displays: The places.
    """

    def __init__(self, *displays: Display) -> None:
        self.displays = displays

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Tell all of them."""
        for display in self.displays:
            display.start_epoch(epoch, epochs, steps)

    def observing(self, epoch: int, epochs: int, passes: int) -> None:
        """Tell all of them."""
        for display in self.displays:
            display.observing(epoch, epochs, passes)

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        """Tell all of them."""
        for display in self.displays:
            display.step(loss, samples_per_second, peak_bytes)

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Tell all of them."""
        for display in self.displays:
            display.end_epoch(metrics)

    def close(self) -> None:
        """Close all of them."""
        for display in self.displays:
            display.close()


def display_of(
    progress: bool | Display, title: str, budget: Budget | None, *, shown: bool = True, log: Console | None = None
) -> Display:
    """Return where a run shows its progress.

    Args:
        progress: Whether it does, on standard error; or a display of the user's own.
        title: What runs.
        budget: What it may take.
        shown: Whether this process is the one that speaks.
        log: A console that lines are written to as well.
    """
    if not isinstance(progress, bool):
        return progress
    amount = budget.amount if budget is not None and is_process(budget) else None
    peak = None if budget is None else budget.peak_bytes
    consoles = [Console(stderr=True)] * progress + [log] * (log is not None)
    if not (consoles and shown):
        return Silent()
    lines = [Lines(title, peak, console, process_budget_bytes=amount) for console in consoles]
    return lines[0] if len(lines) == 1 else Several(*lines)
