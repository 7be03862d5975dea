"""The largest batch and the longest sequence whose training step fits into a memory limit, method by method.

On the CPU a step fits if the peak of its live tensors, weights and batch included, stays within the limit. On
CUDA it runs, and fits if the allocator's peak stays within the limit and nothing ran out of memory. TraDy trains 2 %
of the channels of every layer and recomputes all segments. Steps are plain SGD, as in the other benchmarks.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import text
from benchmarks.methods import METHODS, TITLES, Method, trady_step
from benchmarks.options import add_device, add_json, add_methods, console_for, device_of, main, write_json
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError, Task
from benchmarks.workloads import WORKLOADS, Workload
from trady.errors import BudgetError, DataError
from trady.planning.budget import parse_budget
from trady.report.units import format_bytes

#: A configuration, its limit where none is given, and what the searched length is a multiple of.
MODELS: dict[str, tuple[Callable[[int, int], Task], str, int]] = {
    "llama-tiny": (text.llama, "300 MiB", 64),
    "llama-1b": (
        partial(text.llama, layers=16, width=2048, intermediate=8192, vocabulary=128256, heads=32, key_heads=8),
        "24 GiB",
        256,
    ),
}

COMPARED = ("full", "lora", "lora-checkpoint", "trady")

#: Neither batch nor sequence is looked for beyond this many of its steps.
MOST = 4096


@dataclass(frozen=True)
class Limit:
    """What fits with one method.

    Attributes:
        method: A key of ``METHODS``.
        batch: Largest number of sequences of the asked length; 0 if not even one fits.
        length: Most tokens of the asked number of sequences; 0 if the shortest does not fit.
    """

    method: str
    batch: int
    length: int


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """Return the largest number from 1 to ``most`` that fits; 0 if none does. What is smaller fits too."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def method_of(name: str) -> Method:
    """Return the method; TraDy in the form that takes the least memory."""
    return partial(trady_step, recompute="all") if name == "trady" else METHODS[name]


def peak_of(method: Method, workload: Workload, task: Task, device: torch.device) -> int | None:
    """Run one step; return the most bytes it took with weights and batch, ``None`` where memory ran out."""
    if device.type == "cpu":
        with method(workload, task) as step:
            return step.ledger().peak_bytes
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with method(workload, task.to(device)) as step:
            step.run()
            torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device)


def search(
    make: Callable[[int, int], Task],
    method: str,
    limit: int,
    sequences: int,
    length: int,
    unit: int,
    device: torch.device,
) -> Limit:
    """Look for the largest batch of this length, then for the longest sequences of a batch of this size.

    Args:
        make: Builds a task of this many sequences of this many tokens.
        method: A key of ``METHODS``.
        limit: Bytes that a step may take.
        sequences: Of the batch whose length is looked for.
        length: Tokens of the sequences whose number is looked for.
        unit: The length found is a multiple of it.
        device: Where steps run.

    Raises:
        SkippedError: The method does not fit this model.
        MissingPackageError: A package is missing.

    """

    def fits(batch: int, tokens: int) -> bool:
        try:
            peak = peak_of(method_of(method), WORKLOADS["llama-tiny"], make(batch, tokens), device)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return peak is not None and peak <= limit

    return Limit(
        method,
        batch=largest(lambda batch: fits(batch, length)),
        length=unit * largest(lambda units: fits(sequences, unit * units)),
    )


def as_table(title: str, limits: Sequence[Limit], sequences: int, length: int) -> Table:
    """Return the table that a person reads."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column(f"largest batch of {length} tokens", justify="right")
    table.add_column(f"longest of {sequences} sequences", justify="right")
    for found in limits:
        table.add_row(TITLES[found.method], str(found.batch or "none"), str(found.length or "none"))
    return table


def run(arguments: Sequence[str] | None = None) -> int:
    """Search and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="llama-tiny", help="(default: llama-tiny)")
    parser.add_argument("--limit", metavar="SIZE", help="what a step may take (default: 300 MiB; of llama-1b 24 GiB)")
    parser.add_argument("--batch", type=int, default=8, help="sequences whose length is looked for (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of the batch that is looked for (default: 256)")
    add_device(parser)
    add_methods(parser, [name for name in METHODS if name not in ("floor", "trady-keep", "static-random")], COMPARED)
    add_json(parser)
    options = parser.parse_args(arguments)
    make, usual, unit = MODELS[options.model]
    limit = parse_budget(options.limit or usual)
    if not limit.scope.bounds_peak:
        raise BudgetError(f"--limit is {limit}; it is what a whole step may take, such as 300 MiB")
    if min(options.batch, options.length) < 1:
        raise DataError(f"--batch is {options.batch} and --length {options.length}; both are at least 1")
    device, console = device_of(options), console_for(options.json)
    limits, skipped = list[Limit](), dict[str, str]()
    for method in track(options.method, console=Console(stderr=True), transient=True):
        try:
            limits.append(search(make, method, limit.amount, options.batch, options.length, unit, device))
        except (SkippedError, MissingPackageError) as reason:
            skipped[method] = str(reason)
    console.print(as_table(f"{options.model} in {format_bytes(limit.amount)}", limits, options.batch, options.length))
    for method, why in skipped.items():
        console.print(f"{TITLES[method]} is left out: {why}")
    figures: dict[str, Any] = {"model": options.model, "limit_bytes": limit.amount, "device": str(device)}
    figures |= {"batch": options.batch, "length": options.length, "skipped": skipped}
    write_json(options.json, {**figures, "limits": [asdict(found) for found in limits]})
    return 0


if __name__ == "__main__":
    main(run)
