"""``python -m benchmarks.devices``: training in several processes, beside one process, and after kills.

Without ``--kills``, models train in one, two and four processes on the same global batches. With it, one process of
several is killed at random moments, and the run goes on in 1, 2 and 4 processes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.devices import alike
from benchmarks.options import add_json, console_for, main, stopped_by_sigterm, write_json
from trady.errors import TrainingError


def kill(options: argparse.Namespace, console: Console) -> int:
    """Kill processes, print and write; return the exit code."""
    from benchmarks.devices.kills import Campaign, warm_up

    if sys.platform == "win32":
        raise TrainingError("these trials fork processes and send them signals, which Windows does not have")
    torch.set_num_threads(1)
    seed, started = int(time.time()) if options.seed is None else options.seed, time.monotonic()
    warm_up()
    with stopped_by_sigterm(), tempfile.TemporaryDirectory(prefix="trady-kills-") as folder:
        campaign = Campaign(Path(folder), random.Random(seed))
        try:
            for found in campaign.run(options.kills):
                console.print(f"{found.kills} killed, {len(found.wrong)} wrong", highlight=False)
        except KeyboardInterrupt:
            console.print("stopped; this is what has been done")
    found = campaign.found
    console.print(
        f"{found.kills} kills, {found.training} of them in training, {found.within} with a "
        f"checkpoint of the middle of an epoch; {found.reasons} other processes said why they ended, the slowest after "
        f"{found.slowest_seconds:.2f} s in training, {found.slowest_planning_seconds:.2f} s before; went on: "
        + ", ".join(f"{times} in {count}" for count, times in found.went_on.items())
        + f"; losses at most {found.loss_error:.0e} off",
        highlight=False,
    )
    for line in found.wrong:
        console.print(line, style="red", highlight=False, markup=False)
    write_json(options.json, {"seed": seed, "seconds": time.monotonic() - started, **found.to_json()})
    return 1 if found.wrong else 0


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__)
    models, optimizers = list(alike.MODELS), list(alike.OPTIMIZERS)
    parser.add_argument("--model", nargs="+", choices=models, default=models, metavar="NAME")
    parser.add_argument("--recompute", nargs="+", choices=["none", "auto", "all"], default=["none", "auto", "all"])
    parser.add_argument("--optimizer", nargs="+", choices=optimizers, default=optimizers)
    parser.add_argument("--accumulation", nargs="+", type=int, choices=[1, 3], default=[1, 3], help="passes a step")
    parser.add_argument("--processes", nargs="+", type=int, choices=[2, 4], default=[2, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kills", type=int, metavar="N", help="kill one process, N times, instead")
    parser.add_argument("--seed", type=int, help="of the kills (default: the clock)")
    add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    given = parsed()
    command = alike.run if given.kills is None else kill
    main(lambda: command(given, console_for(given.json)))
