"""Architectures of other libraries: are the gradients the dense model's, and does a peak budget hold?

Models are built with random weights: of transformers from configurations in small, of timm and torchvision as they are,
or with few blocks, on small images. Dropout, layers that are left out at random and masked features are as the library
has them. The gradients of a fifth of the channels of every layer are compared with those of the plain model that draws
the same random numbers, with everything recomputed that can be; then steps are measured that were given 1.1 times the
least peak. Models that the library cannot build or run like this are left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.architectures.attempt import LIBRARIES, Result, attempt
from benchmarks.options import add_json, console_for, main, write_json

#: Seconds for one architecture.
PATIENCE = 600


def apart(library: str, architecture: str) -> Result:
    """Attempt it in a process of its own: what ends that, or does not end, ends nothing else."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--library", library, "--only", architecture]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Result(architecture, "failed", message=f"not done after {PATIENCE} s", library=library)
    if done.returncode:
        says = done.stderr.strip().rpartition("\n")[2] or f"{done.returncode}"
        return Result(architecture, "failed", message=says, library=library)
    return Result(**json.loads(done.stdout.strip().rpartition("\n")[2]))


def as_table(results: Sequence[Result]) -> Table:
    """Return the table that a person reads."""
    table = Table(title="architectures of other libraries", title_justify="left")
    for column in ("architecture", "", "layers", "gradient error", "predicted peak", "of the budget", "seconds"):
        table.add_column(column, justify="left" if column in ("architecture", "") else "right")
    for found in results:
        figures = ("", "", "", "", "")
        if found.kind == "trains":
            off, used = f"{100 * found.prediction_error:+.1f} %", f"{100 * (1 + found.over_budget):.1f} %"
            figures = (str(found.layers), f"{found.gradient_error:.0e}", off, used, f"{found.seconds:.0f}")
        table.add_row(found.architecture, ("" if found.met else "[red]FAIL[/] ") + found.kind, *figures)
    return table


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    return {"architectures": [asdict(found) for found in results]}


def run(arguments: Sequence[str] | None = None) -> int:
    """Try, print, and return 1 if a gradient, a prediction or a budget is off, or an attempt ended in an error."""
    known = sorted({name for library in LIBRARIES.values() for name in library.NAMES})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    help_ = f"of which libraries, out of {', '.join(LIBRARIES)} (default: transformers)"
    parser.add_argument(
        "--library", nargs="+", choices=list(LIBRARIES), default=["transformers"], metavar="NAME", help=help_
    )
    help_ = "which ones, as their library calls them (default: all)"
    parser.add_argument("--architecture", nargs="+", choices=known, default=known, metavar="NAME", help=help_)
    parser.add_argument("--only", choices=known, metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    add_json(parser)
    options = parser.parse_args(arguments)
    if options.only:
        sys.stdout.write(json.dumps(asdict(attempt(options.library[0], options.only))) + "\n")
        return 0
    progress = Console(stderr=True)
    results = list[Result]()
    asked = [
        (library, name)
        for library in options.library
        for name in options.architecture
        if name in LIBRARIES[library].NAMES
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        attempts = pool.map(lambda each: apart(*each), asked)
        for found in track(attempts, total=len(asked), console=progress, transient=True):
            results.append(found)
            if options.json != "-":  # after each: the next one may take minutes
                write_json(options.json, _figures(results))
    console = console_for(options.json)
    console.print(as_table(results))
    for found in results:
        if found.message:
            console.print(f"{found.architecture} ({found.kind}): {found.message[:400]}", highlight=False, markup=False)
    counts = Counter(found.kind for found in results)
    console.print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    write_json(options.json, _figures(results))
    return int(not all(found.met for found in results))


if __name__ == "__main__":
    main(run)
