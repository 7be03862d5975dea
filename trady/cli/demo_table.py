"""Methods side by side: the rows, the table for people, the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: ``head``, ``trady`` or ``full``.
        accuracy: Top-1 after the last epoch, 0 to 1.
        saved_bytes: What a step keeps between forward and backward.
        peak_bytes: Peak tensor memory of a step, weights included.
        inference_peak_bytes: Peak of one inference pass of the untouched model on the same batch.
        step_seconds: Median time of a step, measured in turns with the other methods.
        trainable_parameters: Elements that the optimizer updates.
    """

    method: str
    accuracy: float
    saved_bytes: int
    peak_bytes: int
    inference_peak_bytes: int
    step_seconds: float
    trainable_parameters: int

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


TITLES = {"head": "head only", "trady": "TraDy", "full": "full fine-tuning"}


def as_table(rows: Sequence[Row], title: str) -> Table:
    """Return the table that a person reads."""
    table = Table(title=title, title_justify="left")
    for column in ("method", "accuracy", "saved", "peak", "peak ÷ inference", "step ÷ full", "trainable"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    full = next((row.step_seconds for row in rows if row.method == "full"), None)
    for row in rows:
        table.add_row(
            TITLES.get(row.method, row.method),
            f"{row.accuracy:.1%}",
            f"{row.saved_bytes / MIB:.1f} MiB",
            f"{row.peak_bytes / MIB:.1f} MiB",
            f"{row.peak_bytes / row.inference_peak_bytes:.2f} ×",
            "" if full is None else f"{row.step_seconds / full:.2f} ×",
            f"{row.trainable_parameters:,}".replace(",", " "),
        )
    return table


def draw(rows: Sequence[Row], title: str, folder: Path) -> list[Path]:
    """Write ``demo.png`` and ``demo.svg``: accuracy, peak memory and step time side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [TITLES.get(row.method, row.method) for row in rows]
    colors = ["#1f6f8b" if row.method == "trady" else "#b8c4cc" for row in rows]
    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.4), constrained_layout=True)
    panels = (
        ("accuracy, %", [100 * row.accuracy for row in rows], "{:.1f}"),
        ("peak memory of a step, MiB", [row.peak_bytes / MIB for row in rows], "{:.0f}"),
        ("time of a step, ms", [1000 * row.step_seconds for row in rows], "{:.0f}"),
    )
    for axis, (label, values, form) in zip(axes, panels, strict=True):
        bars = axis.bar(names, values, color=colors, width=0.62, zorder=2)
        texts = axis.bar_label(bars, labels=[form.format(value) for value in values], padding=3, zorder=4)
        for text in texts:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.14)
        axis.tick_params(axis="x", length=0, labelsize=9)
    axes[0].set_ylim(0, 100)
    inference = rows[0].inference_peak_bytes / MIB
    axes[1].axhline(
        inference,
        color="#c0392b",
        linewidth=1.2,
        linestyle="--",
        zorder=3,
        label=f"inference: {inference:.0f}",
    )
    axes[1].legend(loc="upper left", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    paths = [folder / "demo.png", folder / "demo.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths
