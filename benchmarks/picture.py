"""The picture of a comparison: peak memory against time of a step, one point a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.tasks import needs

if TYPE_CHECKING:
    from benchmarks.peer import Peer

MIB = 2**20

#: TraDy, and everything else.
OURS, THEIRS, LIMIT = "#1f6f8b", "#7b8a94", "#c0392b"


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights up, as little as need be, until neighbours are ``gap`` apart; their order stays."""
    moved, above = [0.0] * len(heights), float("-inf")
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        above = moved[index] = max(heights[index], above + gap)
    return moved


def draw(title: str, peers: Sequence[Peer], folder: Path, name: str) -> list[Path]:
    """Write ``<name>.svg`` and ``<name>.png``.

    Args:
        title: What was measured.
        peers: The methods; the lower left corner is the better one.
        folder: Where to write.
        name: Of the files.

    Returns:
        Both paths.

    Raises:
        MissingPackageError: matplotlib is not installed.

    """
    needs("matplotlib", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axis = figure.add_subplot()
    peers = sorted(peers, key=lambda peer: -peer.step_seconds)  # of two as high, the quicker one's line goes above
    times = [peer.step_seconds * 1e3 for peer in peers]
    peaks = [peer.peak_bytes / MIB for peer in peers]
    inference, floor = peers[0].inference_peak_bytes / MIB, peers[0].floor_seconds * 1e3
    top, right = 1.12 * max(*peaks, inference), 1.06 * max(*times, floor)
    axis.set_xlim(0, right)
    axis.set_ylim(0, top)
    axis.axhline(inference, color=LIMIT, linewidth=1.1, linestyle="--", zorder=1)
    axis.axvline(floor, color=THEIRS, linewidth=1.1, linestyle=":", zorder=1)
    axis.annotate(f"inference: {inference:.0f} MiB", (0.006 * right, inference), (0, 3), color=LIMIT, fontsize=8,
                  textcoords="offset points")  # fmt: skip
    axis.annotate(f"floor: {floor:.0f} ms", (floor, 0.995 * top), (-3, 0), color=THEIRS, fontsize=8, rotation=90,
                  va="top", ha="right", textcoords="offset points")  # fmt: skip
    as_high = 0.01 * top
    heights = apart([round(peak / as_high) * as_high for peak in peaks], 0.052 * top)
    for peer, time, peak, height in zip(peers, times, peaks, heights, strict=True):
        ours = peer.method == "trady"
        color = OURS if ours else THEIRS
        axis.scatter([time], [peak], s=58 if ours else 34, color=color, zorder=3 if ours else 2)
        # Names stand beside the picture, on a line with their points as far as there is room.
        axis.annotate(
            f"{peer.title}: {peak:.0f} MiB, {time:.0f} ms",
            xy=(time, peak),
            xytext=(1.03 * right, height),
            annotation_clip=False,
            va="center",
            fontsize=8.5,
            fontweight="bold" if ours else "normal",
            color=color,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.5,
                "alpha": 0.55,
                "shrinkA": 2,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
    axis.set_xlabel("time of a step, ms")
    axis.set_ylabel("peak memory of a step, MiB (without weights and batch)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(fill(title, 95), fontsize=9.5, loc="left")
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
