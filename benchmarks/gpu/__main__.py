"""Measure what a GPU says within a few minutes, most important first; figures are written after each attempt.

Every attempt runs in a process of its own, so that one that fails, hangs or leaves the device unusable costs nobody
else's figures. Nothing but the repository, PyTorch and transformers is needed: models have random weights, data are
made here; rows whose package or file is missing are left out. ``--device cpu --small`` tries the code without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.tables import as_table
from benchmarks.gpu.where import Figures, Where
from benchmarks.options import add_device, device_of, machine, main
from benchmarks.skipped import SkippedError
from benchmarks.tasks import MissingPackageError
from trady.errors import DataError, TradyError
from trady.records.files import write_lines

#: Seconds that an attempt may go on when the time of its part is up.
GRACE = 5.0


@dataclass(frozen=True)
class Asked:
    """What is to be run."""

    device: str
    small: bool
    out: Path
    scratch: Path


def attempt(part: str, item: str, where: Where, file: Path) -> None:
    """Measure one item in this process; the file always has what there is so far."""

    def write(figures: Figures) -> None:
        write_lines(file, [json.dumps(figures)])

    known: Figures = {}

    def remember(figures: Figures) -> None:
        known.update(figures)
        write(figures)

    try:
        PARTS[part].attempt(item, where, remember)
    except (SkippedError, MissingPackageError) as reason:
        write({**known, "left_out": str(reason)})
    except TradyError as error:
        write({**known, "error": str(error)})
    except Exception as error:
        write({**known, "error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]})


def in_own_process(part: str, item: str, deadline: float, asked: Asked) -> Figures:
    """Run an attempt in a process of its own; return what it wrote."""
    if deadline < time.time():
        return {"left_out": "time was up"}
    file = asked.scratch / f"{part}-{item}.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", asked.device, "--out", str(asked.out)]
    command += ["--attempt", f"{part}/{item}", "--deadline", str(deadline), "--file", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PARTS[part].together))}
    ended, told = "time was up", ""
    try:
        done = subprocess.run(
            [*command, *["--small"] * asked.small],
            env=environment,
            timeout=max(1.0, deadline + GRACE - time.time()),
            capture_output=True,
            text=True,
            check=False,
        )
        ended, told = f"exit code {done.returncode}" if done.returncode else "", done.stderr[-1000:]
    except subprocess.TimeoutExpired:
        pass
    figures: Figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if ended:
        figures["ended"] = ended
    if ended and not file.exists():
        figures["error"] = told or ended
    return figures


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print their tables, write their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--out", default="gpu-figures", metavar="DIR", help="folder of gpu.json (default: gpu-figures)")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME", help=_parts())
    parser.add_argument(
        "--item", nargs="+", metavar="NAME", help="only these workloads, models or limits (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="small networks, to try the code")
    add_device(parser)
    parser.set_defaults(device="cuda")
    for internal in ("--attempt", "--deadline", "--file"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = device_of(options)
    if options.attempt:
        part, _, item = options.attempt.partition("/")
        where = Where.of(options.device, float(options.deadline), small=options.small)
        attempt(part, item, where, Path(options.file))
        return 0
    if not options.minutes > 0:
        raise DataError(f"--minutes is {options.minutes}; it is above 0")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        asked = Asked(options.device, options.small, out, Path(scratch))
        measure(options.part, options.item, time.time() + 60 * options.minutes, asked, device)
    return 0


def measure(
    names: Sequence[str], only: Sequence[str] | None, end: float, asked: Asked, device: torch.device
) -> Figures:
    """Run parts one after the other, each within its share of the time that is left; return all figures."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    figures: dict[str, Any] = {"machine": machine() | {"gpu": _gpu(device)}, "parts": {}}
    for index, name in enumerate(names):
        part = PARTS[name]
        rest = sum(PARTS[later].share for later in names[index:])
        began = time.time()
        deadline = began + (end - began) * part.share / rest
        items: Figures = {}
        figures["parts"][name] = {"describe": part.describe, "items": items}
        with ThreadPoolExecutor(part.together) as pool:
            futures = {
                item: pool.submit(in_own_process, name, item, deadline, asked)
                for item in part.items
                if only is None or item in only
            }
            for item, future in futures.items():
                items[item] = future.result()
                figures["parts"][name]["seconds"] = time.time() - began
                write_lines(asked.out / "gpu.json", [json.dumps(figures, indent=1)])
        console.print(as_table(name, part.describe, items))
    return figures


def _gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name() if device.type == "cuda" else None


def _parts() -> str:
    return "which parts: " + "; ".join(f"{name}: {part.describe}" for name, part in PARTS.items()).replace("%", "%%")


if __name__ == "__main__":
    main(run)
