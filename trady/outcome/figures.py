"""The figures of a run's page, as wide as a telephone, so that letters stay readable there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trady.errors import TrainingError
from trady.outcome.finished_run import FinishedRun
from trady.planning.plan import Plan
from trady.report.figures import COLORS, GREY, STYLE, as_svg, label, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Inches; a page shows it at most :data:`CSS_WIDTH` pixels wide.
_WIDTH = 4.7
CSS_WIDTH = 600
_MIB = 2**20
_DRAWS_WITH = "matplotlib"


def check_installed() -> None:
    """Refuse before anything is read.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec(_DRAWS_WITH) is None:
        raise TrainingError('the page draws with matplotlib, which is not installed: pip install "trady[plots]"')


def learning(run: FinishedRun) -> str:
    """Loss by epoch, and accuracy where the task has one, as SVG."""
    accuracies = [100 * epoch.accuracy for epoch in run.history if epoch.accuracy is not None]
    with _drawn(1 + bool(accuracies), 3.6 if accuracies else 2.2) as (figure, axes):
        epochs, losses = [epoch.epoch + 1 for epoch in run.history], axes[0]
        losses.plot(
            epochs, [e.train_loss for e in run.history], "-o", color=COLORS[0], markersize=3.5, label="training"
        )
        losses.plot(
            epochs, [e.evaluation_loss for e in run.history], ":s", color=COLORS[1], markersize=3.5, label="evaluation"
        )
        losses.set(title="loss")
        losses.legend()
        if accuracies:
            axes[1].plot(epochs, accuracies, "-o", color=COLORS[2], markersize=3.5)
            axes[1].set(title="accuracy on the evaluation data, %")
        _by_epoch(axes[-1], len(epochs))
        return as_svg(figure)


def memory(run: FinishedRun) -> str:
    """What the predicted peak is made of, the measured peaks, and the budget, as SVG."""
    parts = [(name, size) for name, size in (run.plan.predicted_parts if run.plan else {}).items() if size]
    with _drawn(1, 1.5 + 0.17 * (len(parts) + 1)) as (figure, (axis,)):
        start = 0.0
        for (name, size), look in zip(parts, looks(), strict=False):
            axis.barh(1, size / _MIB, left=start, color=look.color, height=0.55, label=label(name), edgecolor="white")
            start += size / _MIB
        axis.barh(0, run.peak_bytes / _MIB, color=GREY, height=0.55)
        if run.limit_bytes is not None:
            axis.axvline(run.limit_bytes / _MIB, color="black", linestyle="--", linewidth=1, label="budget")
        axis.set_yticks([1, 0] if parts else [0], ["predicted", "measured"] if parts else ["measured"])
        axis.set(xlabel="peak of a step, weights included, MiB")
        if parts or run.limit_bytes is not None:
            axis.legend(loc="upper left", bbox_to_anchor=(-0.2, -0.32 if parts else -0.5), ncols=2)
        return as_svg(figure)


def places(plan: Plan) -> str:
    """Which share of the channels of each layer trained in the first draw, as SVG."""
    layers = list(plan.table)
    with _drawn(1, 2.4) as (figure, (axis,)):
        shares = [100 * len(plan.selection.channels.get(layer.name, ())) / layer.channels for layer in layers]
        axis.bar(range(1, len(layers) + 1), shares, color=COLORS[0], width=0.8)
        axis.set(xlabel="layer, in the order of execution", ylabel="channels, %", ylim=(0, 100))
        axis.set_xlim(0.4, len(layers) + 0.6)
        return as_svg(figure)


def side_by_side(runs: Sequence[tuple[str, FinishedRun]]) -> str:
    """Accuracy by epoch of several runs or, where a task has none, the evaluation loss, as SVG."""
    have = all(run.last.accuracy is not None for _, run in runs)
    with _drawn(1, 2.6 + 0.18 * len(runs)) as (figure, (axis,)):
        for (name, run), look in zip(runs, looks(), strict=False):
            epochs = [epoch.epoch + 1 for epoch in run.history]
            values = [100 * (e.accuracy or 0.0) if have else e.evaluation_loss for e in run.history]
            style = {"color": look.color, "linestyle": look.line, "marker": look.marker, "markersize": 4}
            axis.plot(epochs, values, label=label(name), **style)
        axis.set(ylabel="accuracy, %" if have else "evaluation loss")
        _by_epoch(axis, max(len(run.history) for _, run in runs))
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.22))
        return as_svg(figure)


def _by_epoch(axis: Any, last: int) -> None:
    """Let an axis count epochs."""
    axis.set(xlabel="epoch", xlim=(0.75, last + 0.25))
    axis.xaxis.get_major_locator().set_params(integer=True)
    if last == 1:
        axis.set_xticks([1])


class _drawn:  # noqa: N801 - reads as what happens
    """A figure of one column in the style of the reports, closed afterwards."""

    def __init__(self, panels: int, height: float) -> None:
        self._panels, self._height = panels, height

    def __enter__(self) -> tuple[Figure, Sequence[Any]]:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self._style = rc_context({**STYLE, "font.size": 11, "axes.titlesize": 11, "legend.fontsize": 10.5})
        self._style.__enter__()
        figure = Figure(figsize=(_WIDTH, self._height), layout="constrained")
        axes = figure.subplots(self._panels, 1, sharex=True, squeeze=False)
        return figure, list(axes[:, 0])

    def __exit__(self, *exception: object) -> None:
        self._style.__exit__(None, None, None)
