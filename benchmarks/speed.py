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
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from benchmarks.methods import METHODS, TITLES, trady_step
from benchmarks.options import (
    add_device,
    add_json,
    add_layout,
    add_methods,
    add_models,
    add_workloads,
    console_for,
    device_of,
    machine,
    main,
    models_folder,
    write_json,
)
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError
from benchmarks.workloads import CPU, WORKLOADS, Workload, laid_out
from trady.errors import BudgetError, TradyError

#: Timed by default; ``benchmarks.peers`` times them all.
TIMED = ("full", "head", "trady", "trady-keep", "floor")

#: What ratios are taken over.
OVER = ("full", "floor")

WARM_UP_ROUNDS = 2

#: ``cpu`` is processor time of this process, summed over its threads.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def add_timing(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """Ask how steps are to be timed: ``repeats``, ``threads`` and ``clock``."""
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"rounds (default: {repeats})")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall (default) or processor time")


def timing(options: argparse.Namespace, device: torch.device = CPU) -> tuple[int, Callable[[], float]]:
    """Set the threads that :func:`add_timing` asked for; return rounds and clock.

    Raises:
        TradyError: Processor time was asked for on CUDA.

    """
    if device.type == "cuda" and options.clock == "cpu":
        raise TradyError("--clock cpu: processor time says nothing of a step on --device cuda; take --clock wall")
    if options.threads:
        torch.set_num_threads(options.threads)
    return max(1, options.repeats), CLOCKS[options.clock] if device.type == "cpu" else when_done


def when_done() -> float:
    """Return the time on the wall when the CUDA device has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


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


def measure(
    workload: Workload,
    models: Path,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    methods: Collection[str] = TIMED,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time a step of every method, in turns.

    Args:
        workload: The workload; each method gets a model of its own.
        models: Folder of the backbones.
        rounds: How often to time each.
        clock: Gives seconds.
        methods: Keys of ``METHODS``.

    Returns:
        Seconds, one a round; and the methods that are left out, with the reason.

    """
    with ExitStack() as stack:
        steps, skipped = dict[str, Callable[[], None]](), dict[str, str]()
        for name in methods:
            task = workload.make(models)
            try:
                steps[name] = stack.enter_context(METHODS[name](workload, task)).run
            except (SkippedError, MissingPackageError) as reason:
                skipped[name] = str(reason)
        return in_turns(steps, rounds, clock), skipped


def measure_limits(
    workload: Workload,
    models: Path,
    limits: Sequence[float],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Time steps whose backward pass stops early, in turns with full fine-tuning.

    Args:
        workload: The workload; channels are drawn from all layers that a limit leaves.
        models: Folder of the backbones.
        limits: What a step may take of the operations of full fine-tuning.
        rounds: How often to time each.
        clock: Gives seconds.

    Returns:
        For each limit that is possible: where the backward pass stops, and the step over full fine-tuning,
        ``predicted`` by its operations and ``measured``.

    """
    with ExitStack() as stack:
        full = stack.enter_context(METHODS["full"](workload, workload.make(models)))
        steps, found = {"full": full.run}, dict[str, dict[str, Any]]()
        for limit in limits:
            limited = trady_step(workload, workload.make(models), policy="dynamic-random", max_step_flops=limit)
            try:
                step = stack.enter_context(limited)
            except BudgetError as reason:
                found[f"{limit:g}x"] = {"refused": str(reason)}
                continue
            counted = step.tuner.plan.step
            assert counted is not None
            steps[f"{limit:g}x"] = step.run
            found[f"{limit:g}x"] = {"predicted": counted.over_full, **counted.to_json()}
        seconds = in_turns(steps, rounds, clock)
    for name in steps.keys() - {"full"}:
        found[name] |= {"measured": ratio(seconds, name, "full"), "seconds": seconds[name]}
    return found


def limits_table(workload: Workload, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of :func:`measure_limits` that a person reads."""
    table = Table(title=f"{workload.name}: a step over full fine-tuning", title_justify="left")
    for column in ("limit", "backward stops at", "layers passed", "operations", "time"):
        table.add_column(column, justify="right" if column in ("operations", "time") else "left")
    for limit, one in found.items():
        if "refused" in one:
            table.add_row(limit, one["refused"], "", "", "")
        else:
            passed = f"{one['passed']} of {one['layers']}"
            table.add_row(limit, one["stops_at"], passed, f"{one['predicted']:.2f} ×", f"{one['measured']:.2f} ×")
    return table


def aims(workload: Workload, seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Hold TraDy's step against the aims of the workload, as far as both methods were timed.

    That over the floor is for a step that recomputes nothing.
    """
    if "trady" not in seconds:
        return {}
    found = {}
    keep = "trady-keep" if "trady-keep" in seconds else "trady"
    for method, over, aim in (
        ("trady", "full", workload.bars.step_over_full),
        (keep, "floor", workload.bars.step_over_floor),
    ):
        if over in seconds:
            measured = ratio(seconds, method, over)
            found[over] = {"aim": aim, "measured": measured, "met": measured <= aim, "method": method}
    return found


def as_table(workload: Workload, seconds: Mapping[str, Sequence[float]]) -> Table:
    """Return the table that a person reads."""
    table = Table(title=f"{workload.name}: {workload.describe}", title_justify="left")
    table.add_column("method")
    for column in ("step, median", "fastest", "÷ full", "÷ floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for method, times in seconds.items():
        ratios = (f"{ratio(seconds, method, over):.2f} ×" if over in seconds else "" for over in OVER)
        table.add_row(TITLES[method], f"{median(times) * 1e3:.0f} ms", f"{min(times) * 1e3:.0f} ms", *ratios)
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    add_workloads(parser, WORKLOADS)
    add_layout(parser)
    add_device(parser)
    add_methods(parser, METHODS, TIMED)
    add_timing(parser, repeats=9)
    parser.add_argument(
        "--max-step-flops",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="instead: steps held to these shares of the operations of full fine-tuning, as predicted and as measured",
    )
    add_models(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    device = device_of(options)
    rounds, clock = timing(options, device)
    console, figures = console_for(options.json), dict[str, Any]()
    for name in options.workload:
        workload = laid_out(WORKLOADS[name], channels_last=options.channels_last, device=device)
        if options.max_step_flops:
            limits = measure_limits(workload, models_folder(options.models), options.max_step_flops, rounds, clock)
            console.print(limits_table(workload, limits))
            figures[name] = limits
            continue
        seconds, skipped = measure(workload, models_folder(options.models), rounds, clock, options.method)
        console.print(as_table(workload, seconds))
        for method, reason in skipped.items():
            console.print(f"{TITLES[method]} is left out: {reason}", style="dim", highlight=False)
        reached = aims(workload, seconds)
        for over, aim in reached.items():
            word = "[green]met[/]" if aim["met"] else "[yellow]missed[/]"
            who = TITLES[aim["method"]]
            console.print(f"{word}  {who}, aim {aim['aim']:g} × {TITLES[over]}: {aim['measured']:.2f} ×")
        figures[name] = {
            "seconds": seconds,
            "skipped": skipped,
            "trady_over": {over: aim["measured"] for over, aim in reached.items()},
            "aims": {over: {"aim": aim["aim"], "met": aim["met"]} for over, aim in reached.items()},
        }
    here = machine()
    load = " ".join(f"{x:.1f}" for x in here["load_average"] or ()) or "unknown"
    gpu = f", {here['gpu']}" if here["gpu"] else ""
    console.print(
        f"{options.clock} time, {options.repeats} rounds, {here['threads']} threads on {here['processors']} "
        f"processors{gpu}, torch {here['torch']}, load average {load} after the last round"
    )
    write_json(options.json, {"device": str(device), "clock": options.clock, "workloads": figures})
    return 0


if __name__ == "__main__":
    main(run)
