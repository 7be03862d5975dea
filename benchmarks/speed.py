"""Time of one training step: TraDy against full fine-tuning and against the floor.

The floor is a forward pass and the gradient of the input, in plain PyTorch with every weight frozen. All
methods run in turns in one process, so that each round sees the same machine; ratios are taken round by
round and their median is reported. Timings gate nothing: the exit code is 0.

On a machine that others use, parallel regions wait for the slowest thread: there ``--threads 1 --clock cpu``
(processor time of this process) says more of the work that a step does than the clock on the wall.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.methods import METHODS, TITLES
from benchmarks.options import add_json, add_models, add_workloads, machine, main, models_folder, write_json
from benchmarks.workloads import WORKLOADS, Workload

#: Aims for TraDy's step, over that of another method.
AIMS = {"full": 0.5, "floor": 1.0}

WARM_UP_ROUNDS = 2

#: ``cpu`` is processor time of this process, summed over its threads.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turns(
    steps: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time every step once a round, each round beginning with another step.

    Args:
        steps: What to time.
        rounds: Rounds that count, behind those that warm up.
        clock: Gives seconds.

    Returns:
        Seconds, one a round.

    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP_ROUNDS, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            steps[name]()
            if turn >= 0:
                seconds[name].append(clock() - started)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], method: str, over: str) -> float:
    """Return the median over rounds of one method's time over another's."""
    return median(ours / theirs for ours, theirs in zip(seconds[method], seconds[over], strict=True))


def measure(workload: Workload, models: Path, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time a step of every method, in turns; seconds, one a round."""
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(method(workload, workload.make(models))).run for name, method in METHODS.items()
        }
        return in_turns(steps, rounds, clock)


def as_table(workload: Workload, seconds: Mapping[str, Sequence[float]]) -> Table:
    """Return the table that a person reads."""
    table = Table(title=f"{workload.name}: {workload.describe}", title_justify="left")
    table.add_column("method")
    for column in ("step, median", "fastest", "÷ full", "÷ floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for method, times in seconds.items():
        ratios = (f"{ratio(seconds, method, over):.2f} ×" for over in AIMS)
        table.add_row(TITLES[method], f"{median(times) * 1e3:.0f} ms", f"{min(times) * 1e3:.0f} ms", *ratios)
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    add_workloads(parser, WORKLOADS)
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds to time (default: 9)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall (default) or processor time")
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console, figures = Console(stderr=options.json == "-"), dict[str, Any]()
    for name in options.workload:
        workload = WORKLOADS[name]
        seconds = measure(workload, models_folder(options.models), max(1, options.repeats), CLOCKS[options.clock])
        console.print(as_table(workload, seconds))
        ratios = {over: ratio(seconds, "trady", over) for over in AIMS}
        for over, aim in AIMS.items():
            word = "[green]met[/]" if ratios[over] <= aim else "[yellow]missed[/]"
            console.print(f"{word}  aim {aim:.1f} × {TITLES[over]}: {ratios[over]:.2f} ×")
        figures[name] = {
            "seconds": seconds,
            "trady_over": ratios,
            "aims": {over: {"aim": aim, "met": ratios[over] <= aim} for over, aim in AIMS.items()},
        }
    here = machine()
    load = " ".join(f"{x:.1f}" for x in here["load_average"] or ()) or "unknown"
    console.print(
        f"{options.clock} time, {options.repeats} rounds, {here['threads']} threads on {here['processors']} "
        f"processors, torch {here['torch']}, load average {load} after the last round"
    )
    write_json(options.json, {"clock": options.clock, "workloads": figures})
    return 0


if __name__ == "__main__":
    main(run)
