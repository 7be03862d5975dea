"""``python -m benchmarks.reliability``: stop runs in every way that happens, and see what is left of them.

Small runs are killed and asked to stop at random moments, started twice at once, and run out of disk space. Each is
started again until it ends. What counts: no checkpoint that was complete is lost, the run goes on from the last one,
its weights are those of a run that nobody stopped, bit for bit, and no file is left over. --write writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import options
from benchmarks.reliability.report import COLUMNS, page, row
from benchmarks.reliability.task import warm_up
from benchmarks.reliability.trials import Tally, Trials
from trady.errors import TrainingError
from trady.records.files import write_bytes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run all trials; 1 if anything was lost, different, left over or ended as it should not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    for name, count, what in (
        ("kills", 300, "SIGKILLs at random moments"),
        ("terms", 50, "SIGTERMs at random moments"),
        ("hangups", 10, "SIGHUPs at random moments"),
        ("pairs", 20, "pairs of processes that resume the same run"),
        ("disks", 20, "disks that fill up"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"{what} (default: {count})")
    parser.add_argument("--seed", type=int, help="of everything random here (default: the clock)")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} into docs/")
    options.add_json(parser)
    chosen = parser.parse_args(arguments)
    if sys.platform == "win32":
        raise TrainingError("these trials fork processes and send them signals, which Windows does not have")
    torch.set_num_threads(1)
    seed = int(time.time()) if chosen.seed is None else chosen.seed
    console, started = options.console_for(chosen.json), time.monotonic()
    tallies: list[Tally] = []
    stopped = False
    warm_up()
    with options.stopped_by_sigterm(), tempfile.TemporaryDirectory(prefix="trady-reliability-") as folder:
        trials = Trials(Path(folder), random.Random(seed))
        kinds = {
            "pairs": trials.pairs(chosen.pairs),
            "disks": trials.full_disks(chosen.disks),
            "hangups": trials.terms(chosen.hangups, signal.SIGHUP),
            "terms": trials.terms(chosen.terms, signal.SIGTERM),
            "kills": trials.kills(chosen.kills),
        }
        try:
            for name, kind in kinds.items():
                if getattr(chosen, name) > 0:
                    _follow(kind, console, tallies)
        except KeyboardInterrupt:
            stopped = True
            console.print("stopped; this is what has been done")
    seconds = time.monotonic() - started
    console.print(_table(tallies))
    for line in (line for tally in tallies for line in tally.said):
        console.print(line, style="red", highlight=False, markup=False)
    if chosen.write:
        asked = " ".join(f"--{name} {getattr(chosen, name)}" for name in kinds)
        write_bytes(PAGE, page(tallies, asked, seed, seconds, datetime.datetime.now().astimezone()).encode())
        console.print(f"written: {PAGE}")
    options.write_json(chosen.json, {"seed": seed, "seconds": seconds, "trials": [asdict(each) for each in tallies]})
    return 130 if stopped else 1 if any(tally.bad for tally in tallies) else 0


def _follow(kind: Iterator[Tally], console: Console, tallies: list[Tally]) -> None:
    tally = next(kind)
    tallies.append(tally)
    for tally in kind:
        if tally.trials % 10 == 0:
            console.print(f"{tally.kind}: {tally.trials} done, {tally.bad} wrong", highlight=False)


def _table(tallies: Sequence[Tally]) -> Table:
    table = Table(*COLUMNS)
    for tally in tallies:
        table.add_row(*row(tally))
    return table


if __name__ == "__main__":
    options.main(run)
