"""The figures of a study, as in a paper; each is a function from statistics to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from trady.errors import TrainingError
from trady.records.files import write_bytes
from trady.report.figures import COLORS, GREY, STYLE, as_png, as_svg, label, looks
from trady.study.heavy_tails import TOP_SHARES
from trady.study.stability import POOL_SHARE
from trady.study.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {**STYLE, "legend.fontsize": 9, "lines.linewidth": 1.6}


def tail_indices(found: Statistics) -> Figure:
    """Stable index by layer: one panel a data set, the last epoch with intervals, epochs before it as lines."""
    datasets = _datasets(found)
    figure, axes = _panels(len(datasets), 2.5)
    names = list(dict.fromkeys(tail.layer for tail in found.heavy_tails.layers))
    place = {name: at for at, name in enumerate(names, start=1)}
    last = found.settings.epochs - 1
    for axis, dataset in zip(axes, datasets, strict=True):
        tails = [tail for tail in found.heavy_tails.layers if tail.dataset == dataset and tail.stable and tail.gaussian]
        for epoch in range(last + 1):
            here = [tail for tail in tails if tail.epoch == epoch]
            x = sorted({place[tail.layer] for tail in here})
            stable = [[tail.stable for tail in here if tail.stable and place[tail.layer] == at] for at in x]
            middle = np.array([np.mean([estimate.value for estimate in group]) for group in stable])
            if epoch < last:
                axis.plot(x, middle, color=COLORS[0], alpha=0.25 + 0.3 * epoch / max(last, 1), linewidth=1,
                          label=f"epoch {epoch + 1}")  # fmt: skip
                continue
            ends = [
                [
                    abs(np.mean([getattr(estimate, end) for estimate in group]) - mean)
                    for group, mean in zip(stable, middle, strict=True)
                ]
                for end in ("low", "high")
            ]
            axis.errorbar(x, middle, ends, color=COLORS[0], fmt="o", markersize=3.5, elinewidth=1,
                          label=f"epoch {epoch + 1}, 95 %")  # fmt: skip
            control = [
                np.mean([tail.gaussian.value for tail in here if tail.gaussian and place[tail.layer] == at]) for at in x
            ]
            axis.plot(x, control, color=GREY, linestyle="--", label="Gaussian, same scales")
        axis.axhline(2, color="black", linewidth=0.8)
        axis.set(title=dataset, ylabel="tail index α")
    axes[-1].set_xlabel("layer, in order of execution")
    axes[0].legend(loc="lower left", ncols=2, bbox_to_anchor=(0, 1.12))
    return figure


def tail_curves(found: Statistics) -> Figure:
    """Share of the noise beyond a number of medians, beside that of a Gaussian."""
    figure, (axis,) = _panels(1, 3.4)
    longest: Sequence[float] = ()
    for look, curve in zip(looks(), found.heavy_tails.curves, strict=False):
        axis.loglog(curve.medians, curve.exceeding, look.line, color=look.color, label=label(curve.dataset))
        longest = max(longest, curve.exceeding, key=len)
    normal = NormalDist()
    # The first share is 1, and no value is exceeded by all.
    gaussian = [normal.inv_cdf(1 - share / 2) / normal.inv_cdf(0.75) for share in longest[1:]]
    axis.loglog(gaussian, longest[1:], color=GREY, linestyle="--", label="Gaussian")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")  # powers of ten would be set as mathematics
    axis.set(xlabel="|noise| over its median", ylabel="share of values beyond", xlim=(0.5, None))
    axis.legend()
    return figure


def top_shares(found: Statistics) -> Figure:
    """Share of the gradient that the top channels carry."""
    datasets = _datasets(found)
    figure, axes = _panels(len(datasets), 2.3)
    epochs = found.settings.epochs
    for axis, dataset in zip(axes, datasets, strict=True):
        for epoch in range(epochs):
            here = [top for top in found.heavy_tails.top_shares if top.dataset == dataset and top.epoch == epoch]
            x = np.arange(len(here)) + (epoch - (epochs - 1) / 2) * 0.8 / epochs
            values = [100 * top.carried.value for top in here]
            ends = [
                [100 * (top.carried.value - top.carried.low) for top in here],
                [100 * (top.carried.high - top.carried.value) for top in here],
            ]
            axis.bar(x, values, 0.72 / epochs, yerr=ends, color=COLORS[0], alpha=0.35 + 0.65 * (epoch + 1) / epochs,
                     error_kw={"elinewidth": 1}, label=f"epoch {epoch + 1}")  # fmt: skip
        axis.set_xticks(range(len(TOP_SHARES)), [f"top {share:.0%}" for share in TOP_SHARES])
        axis.set(title=dataset, ylabel="% of ‖∂L/∂W‖²", ylim=(0, 100))
        axis.tick_params(axis="x", length=0)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.1), ncols=min(epochs, 4))
    return figure


def rank_matrix(found: Statistics) -> Figure:
    """Spearman's correlation of layer RGN between all recorded epochs."""
    figure, (axis,) = _panels(1, 5.0)
    matrix = np.array(found.stability.matrix)
    image = axis.imshow(matrix, cmap="viridis", vmin=min(0.8, float(matrix.min())), vmax=1)
    epochs = found.settings.epochs
    starts = np.arange(0, len(matrix), epochs)
    for start in starts[1:]:
        new_task = found.runs[start // epochs].dataset != found.runs[start // epochs - 1].dataset
        for line in (axis.axhline, axis.axvline):
            line(start - 0.5, color="white", linewidth=2.5 if new_task else 0.8)
    labels = [f"{run.dataset}, {run.seed}" for run in found.runs]
    axis.set_xticks(starts + (epochs - 1) / 2, labels, rotation=45, ha="right")
    axis.set_yticks(starts + (epochs - 1) / 2, labels)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axis, shrink=0.7, label="Spearman")
    return figure


def cumulated_rgn(found: Statistics) -> Figure:
    """Cumulated layer RGN, highest layer first."""
    figure, (axis,) = _panels(1, 3.2)
    for look, (dataset, curve) in zip(looks(), found.stability.curves.items(), strict=False):
        k = next(at for at, share in enumerate(curve, start=1) if share >= POOL_SHARE - 1e-12)
        axis.plot(range(1, len(curve) + 1), [100 * share for share in curve], look.line, color=look.color,
                  label=label(f"{dataset}: K = {k}"))  # fmt: skip
        axis.plot([k], [100 * curve[k - 1]], look.marker, color=look.color)
    axis.axhline(100 * POOL_SHARE, color=GREY, linestyle="--", linewidth=1)
    axis.set(xlabel="layers, by falling RGN", ylabel="% of cumulated layer RGN", ylim=(0, 102))
    axis.legend(loc="lower right")
    return figure


def task_tests(found: Statistics) -> Figure:
    """Share of each layer's channels whose mean share of the layer's gradient differs."""
    figure, (axis,) = _panels(1, 3.2)
    titles = {"tasks": "two tasks", "seeds": "two seeds of one task"}
    place: dict[str, int] = {}
    for color, (kind, title) in zip(COLORS, titles.items(), strict=False):
        tests = [test for test in found.importance if test.kind == kind]
        layers: dict[str, list[float]] = {}
        for test in tests:
            for layer in test.layers:
                layers.setdefault(layer.layer, []).append(100 * layer.rejected_shares)
        x = [place.setdefault(name, len(place) + 1) for name in layers]
        axis.plot(x, [np.mean(values) for values in layers.values()], "o-", markersize=3.5, linewidth=1, color=color,
                  label=title)  # fmt: skip
    axis.set(xlabel="layer, in order of execution", ylabel="% of channels that differ", ylim=(0, 102))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def kept_gradient(found: Statistics) -> Figure:
    """Gradient kept at equal memory, by RGN and by norm."""
    datasets = _datasets(found)
    figure, axes = _panels(len(datasets), 2.6)
    for axis, dataset in zip(axes, datasets, strict=True):
        points = [point for point in found.kept if point.dataset == dataset]
        x = [100 * point.share for point in points]
        for color, (name, title) in zip(
            (*COLORS[:2], GREY),
            (("rgn", "highest RGN"), ("norm", "highest norm"), ("random", "at random")),
            strict=True,
        ):
            axis.plot(x, [100 * getattr(point, name) for point in points], "o-", markersize=3, color=color, label=title)
        axis.set_xscale("log")
        ticks = [0.3, 1, 3, 10, 30, 100]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(title=dataset, ylabel="% of ‖∂L/∂W‖² kept", ylim=(0, 102))
    axes[-1].set_xlabel("budget B_mem, % of all weights and activations")
    axes[0].legend(loc="lower right")
    return figure


def online_ranking(found: Statistics) -> Figure:
    """Online ranking against offline, by draws and budget."""
    figure, (agreement, overlap) = _panels(2, 2.5)
    for look, elements in zip(looks(), dict.fromkeys(point.elements for point in found.online), strict=False):
        points = [point for point in found.online if point.elements == elements]
        x = [point.draws for point in points]
        title = f"{elements:,} elements".replace(",", " ")
        line, color = f"{look.marker}-", look.color
        agreement.plot(x, [point.spearman for point in points], line, markersize=3.5, color=color, label=title)
        agreement.plot(x, [point.spearman_same_steps for point in points], ":", linewidth=1.2, color=color)
        overlap.plot(x, [point.overlap for point in points], line, markersize=3.5, color=color)
    k = found.online[0].k_offline
    overlap.axhline(k, color=GREY, linestyle="--", linewidth=1)
    agreement.set(ylabel="Spearman", ylim=(None, 1.01))
    overlap.set(ylabel=f"of the top K = {k:.0f}" if k == round(k) else f"of the top K ≈ {k:.1f}", ylim=(0, 1.05 * k))
    for axis in (agreement, overlap):
        axis.set_xscale("log")
        axis.set_xticks(x, list(map(str, x)))
        axis.minorticks_off()
    overlap.set_xlabel("draws, one batch each")
    agreement.legend(loc="lower right")
    return figure


#: Name of the files, and the function that draws the figure.
FIGURES: dict[str, Callable[[Statistics], Figure]] = {
    "tail-indices": tail_indices,
    "tail-curves": tail_curves,
    "top-shares": top_shares,
    "rank-matrix": rank_matrix,
    "cumulated-rgn": cumulated_rgn,
    "task-tests": task_tests,
    "kept-gradient": kept_gradient,
    "online-ranking": online_ranking,
}


def draw_all(found: Statistics, folder: Path) -> dict[str, str]:
    """Write every figure as SVG and PNG.

    Args:
        found: What to draw.
        folder: Where to.

    Returns:
        The SVG text of each, by name.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, draw in FIGURES.items():
        with matplotlib.rc_context(_STYLE):
            figure = draw(found)
            drawn[name] = as_svg(figure)
            write_bytes(folder / f"{name}.png", as_png(figure, 150))
        write_bytes(folder / f"{name}.svg", drawn[name].encode())
    return drawn


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, so that they can be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height * count + 0.4), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)
    return figure, list(axes[:, 0])


def _datasets(found: Statistics) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.dataset for run in found.runs))


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise TrainingError('figures need an extra: pip install "trady[study]"') from None
    return matplotlib
