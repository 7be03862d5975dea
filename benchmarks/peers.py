"""TraDy and its peers side by side: memory and time of one training step, in a table and a picture.

Memory is that of ``benchmarks.memory``; then steps of all methods run in turns in one process, as in
``benchmarks.speed``, and the floor with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks import memory, speed
from benchmarks.methods import TITLES
from benchmarks.options import (
    add_device,
    add_json,
    add_layout,
    add_methods,
    add_models,
    add_workloads,
    console_for,
    device_of,
    main,
    models_folder,
    write_json,
)
from benchmarks.peer import Peer
from benchmarks.picture import draw
from benchmarks.workloads import MIB, WORKLOADS, Workload, laid_out


def compare(measured: memory.Measured, seconds: Mapping[str, Sequence[float]]) -> list[Peer]:
    """Join memory and time of every method that has both."""
    floor = median(seconds["floor"])
    return [
        Peer(
            method=row.method,
            title=TITLES[row.method],
            saved_bytes=row.saved_bytes,
            peak_bytes=row.peak_bytes,
            inference_peak_bytes=row.inference_peak_bytes,
            step_seconds=median(seconds[row.method]),
            floor_seconds=floor,
            trainable_parameters=row.trainable_parameters,
            gradient_error=row.gradient_error,
            note=row.note,
        )
        for row, _ in memory.worst_draws(measured.rows)
        if row.method in seconds
    ]


def measure(
    workload: Workload, models: Path, rounds: int, clock: Callable[[], float], methods: Collection[str], draws: int = 1
) -> tuple[list[Peer], memory.Measured]:
    """Measure memory, then time, of these methods; the floor is always timed.

    Args:
        workload: The workload.
        models: Folder of the backbones.
        rounds: How often to time each.
        clock: Gives seconds.
        methods: Keys of ``METHODS``.
        draws: Draws of TraDy's channels to measure the memory of.

    """
    measured = memory.measure(workload, models, draws, methods)
    timed = [method for method in methods if method not in measured.skipped]
    seconds, _ = speed.measure(workload, models, rounds, clock, [*timed, "floor"])
    return compare(measured, seconds), measured


def as_table(workload: Workload, peers: Sequence[Peer]) -> Table:
    """Return the table that a person reads."""
    table = Table(title=f"{workload.name}: {workload.describe}", title_justify="left")
    table.add_column("method")
    for column in ("saved", "peak", "inference peak", "step", "floor", "÷ floor", "trainable"):
        table.add_column(column, justify="right", no_wrap=True)
    for peer in peers:
        sizes = (f"{size / MIB:.1f} MiB" for size in (peer.saved_bytes, peer.peak_bytes, peer.inference_peak_bytes))
        times = (f"{seconds * 1e3:.0f} ms" for seconds in (peer.step_seconds, peer.floor_seconds))
        over, trainable = peer.step_seconds / peer.floor_seconds, f"{peer.trainable_parameters:,}".replace(",", " ")
        table.add_row(peer.title, *sizes, *times, f"{over:.2f} ×", trainable)
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and draw a picture for each workload."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add_workloads(parser, WORKLOADS)
    add_layout(parser)
    add_device(parser)
    add_methods(parser, memory.MEASURED, memory.MEASURED)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for <workload>.svg, <workload>.png, peers.json")
    speed.add_timing(parser, repeats=9)
    parser.add_argument("--draws", type=int, default=3, help="draws of TraDy's channels to measure (default: 3)")
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    device = device_of(options)
    rounds, clock = speed.timing(options, device)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    console, figures = console_for(options.json), dict[str, Any]()
    written = {"device": str(device), "clock": options.clock, "workloads": figures}
    for name in options.workload:
        workload = laid_out(WORKLOADS[name], channels_last=options.channels_last, device=device)
        draws = max(1, options.draws)
        peers, measured = measure(workload, models_folder(options.models), rounds, clock, options.method, draws)
        console.print(as_table(workload, peers))
        for remark in memory.remarks(measured):
            console.print(remark, style="dim", highlight=False)
        figures[name] = {
            "describe": workload.describe,
            "rows": [asdict(peer) for peer in peers],
            "skipped": dict(measured.skipped),
            "inference_peak_without_labels_bytes": measured.scores_peak_bytes,
        }
        if options.out is not None:
            for path in draw(workload.describe, peers, options.out, name):
                console.print(f"wrote {path}", highlight=False)
            # After each workload: the next one may take minutes.
            write_json(str(options.out / "peers.json"), written)
    write_json(options.json, written)
    return 0


if __name__ == "__main__":
    main(run)
