"""The figures of a comparison; each is a function from the summary to a matplotlib figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from trady.compare.matched import Task, score
from trady.compare.summary import Summary
from trady.report import figures as report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: For the policies that take no budget: dashed lines across all of them.
GREYS = ("#000000", report.GREY)


def wins_figure(summary: Summary) -> Figure:
    """The heat map of wins: mean lead of the row over the column, with the tasks won."""
    from matplotlib.figure import Figure

    policies = summary.policies
    count = len(policies)
    wins = {(found.row, found.column): found for found in summary.wins}
    leads = [[_lead(summary, row, column) for column in policies] for row in policies]
    largest = max((abs(lead) for line in leads for lead in line if lead is not None), default=0.0) or 1.0
    side = 1.6 + 0.72 * count
    figure = Figure(figsize=(side + 1.1, side), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(
        [[float("nan") if lead is None else lead for lead in line] for line in leads],
        cmap="PuOr_r",
        vmin=-largest,
        vmax=largest,
    )
    for y, row in enumerate(policies):
        for x, column in enumerate(policies):
            found, lead = wins.get((row, column)), leads[y][x]
            if found is None or lead is None:
                continue
            dark = _is_dark(image.cmap(0.5 + lead / (2 * largest)))
            text = f"{found.in_mean}/{found.tasks}\n({found.significant})"
            star = "*" if _is_significant(summary, row, column) else ""
            axis.text(x, y, text + star, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
    axis.set_xticks(range(count), policies, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(count), policies)
    axis.set_xlabel("… this one")
    axis.set_ylabel("this policy beats …")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, shrink=0.7, label="mean lead, points of accuracy")
    return figure


def budget_figure(summary: Summary) -> Figure:
    """Accuracy by budget: the mean over all tasks, then a panel a model and data set."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys((row.model, row.dataset) for row in summary.rows))
    panels: list[tuple[str, Sequence[tuple[str, str]]]] = [("mean", tasks)] if len(tasks) > 1 else []
    panels += [(f"{model}, {dataset}", [(model, dataset)]) for model, dataset in tasks]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 3.4 * columns, 1.0 + 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    looks = _looks(summary)
    for axis, (title, wanted) in zip(axes, panels, strict=False):
        _lines(axis, summary, wanted, looks)
        axis.set_title(title)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("top-1 accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))
    return figure


def _looks(summary: Summary) -> dict[str, dict[str, Any]]:
    """How the line of every policy is drawn, in all panels and in the legend."""
    series, greys = report.looks(), cycle(GREYS)
    found: dict[str, dict[str, Any]] = {}
    for policy in summary.policies:
        if not score(summary.rows, policy, summary.metric).takes_budget:
            found[policy] = {"color": next(greys), "linestyle": "--", "linewidth": 1.2}
        else:
            look = next(series)
            found[policy] = {"color": look.color, "linestyle": look.line, "marker": look.marker, "linewidth": 1.4}
    return found


def _lines(axis: Axes, summary: Summary, tasks: Sequence[tuple[str, str]], looks: dict[str, dict[str, Any]]) -> None:
    budgets = summary.budgets
    for policy in summary.policies:
        scores, look = score(summary.rows, policy, summary.metric), looks[policy]
        groups = [[scores.by_task.get(Task(*task, budget), {}) for task in tasks] for budget in budgets]
        points = [(at, group) for at, group in enumerate(groups) if all(group)]
        x = [at for at, _ in points]
        y = [100 * statistics.fmean(statistics.fmean(seeds.values()) for seeds in group) for _, group in points]
        if not x:
            axis.plot([], [], **look, markersize=4.5, label=report.label(policy))
        elif not scores.takes_budget:
            axis.axhline(y[0], **look, label=report.label(policy))
        else:
            axis.plot(x, y, **look, markersize=4.5, label=report.label(policy))
            for at, group in points:
                seeds = [100 * value for values in group for value in values.values()] if len(tasks) == 1 else []
                axis.plot([at] * len(seeds), seeds, ".", color=look["color"], markersize=3, alpha=0.5)
    axis.set_xticks(range(len(budgets)), [budget or "none" for budget in budgets])
    axis.set_xlim(-0.3, len(budgets) - 0.7)
    axis.grid(axis="y", alpha=0.25)


def _is_dark(color: Any) -> bool:
    """Whether white stands out more than black on a colour, by the contrast of WCAG 2."""
    red, green, blue = (channel**2.2 for channel in color[:3])
    return bool(0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18)


def _lead(summary: Summary, row: str, column: str) -> float | None:
    """Return the mean difference over matched cells, in points."""
    for first, second, sign in ((row, column, 100), (column, row, -100)):
        if (test := summary.test(first, second)) is not None:
            return sign * test.difference
    return None


def _is_significant(summary: Summary, row: str, column: str) -> bool:
    from trady.compare.statistics import LEVEL

    test = summary.test(row, column) or summary.test(column, row)
    return test is not None and test.adjusted is not None and test.adjusted < LEVEL
