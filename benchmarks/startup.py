"""How long a person waits before anything happens: help, typos, an unreachable Hub, a plan.

``python -m benchmarks.startup`` starts each command several times and prints the median, the fastest and the slowest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks import options

#: What is typed after ``trady``, and the code that it ends with.
COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {
    "help": (("--help",), 0),
    "help of finetune": (("finetune", "--help"), 0),
    "a typo of a model": (("finetune", "efficientnet-lit0", "fashion-mnist"), 2),
    "a typo of an optimizer": (("finetune", "efficientnet-lite0", "fashion-mnist", "--optimizer", "adamv"), 2),
    "a typo of a ranking": (("plan", "efficientnet-lite0", "--ranking", "structual"), 2),
    "a typo of a policy": (("plan", "efficientnet-lite0", "--policy", "tradi"), 2),
    "models": (("models",), 0),
    "a Hub that cannot be reached": (("finetune", "nobody/no-such-model", "fashion-mnist"), 2),
    "plan": (("plan", "efficientnet-lite0", "--image-size", "64", "--budget", "60 MiB"), 0),
}


def seconds(words: Sequence[str], code: int) -> float:
    """Run a command once.

    Raises:
        RuntimeError: It ended otherwise than it should.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "trady", *words], capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode != code:
        raise RuntimeError(f"trady {' '.join(words)} ended with {done.returncode}, not {code}: {done.stderr[-500:]}")
    return taken


def run(arguments: Sequence[str] | None = None) -> int:
    """Time the commands in turns, and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    options.add_json(parser)
    parser.add_argument("--rounds", type=int, default=5, help="times that each is started (default: 5)")
    parser.add_argument("--command", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="NAME")
    chosen = parser.parse_args(arguments)
    taken: dict[str, list[float]] = {name: [] for name in chosen.command}
    for _ in range(chosen.rounds):
        for name in chosen.command:
            taken[name].append(seconds(*COMMANDS[name]))
    table = Table(title=f"seconds until a command has ended, of {chosen.rounds}")
    for column in ("command", "median", "fastest", "slowest"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name, found in taken.items():
        table.add_row(name, f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}")
    Console(width=100).print(table)
    options.write_json(chosen.json, {"machine": options.machine(), "seconds": taken})
    return 0


if __name__ == "__main__":
    options.main(run)
