"""Damage files, read them in a process of their own, and count."""

from __future__ import annotations

import argparse
import json
import os
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fuzz.readers import READERS

#: A process that does not go on for so long is ended: what hangs inside of a library does not see the alarm.
PATIENCE_SECONDS = 20

#: For imports and for the samples, on a machine that is busy.
START_SECONDS = 1200

Tell = Callable[[dict[str, Any]], None]

FAULTS = ("exception", "hang", "allocation", "crash")


def main() -> None:
    names = [reader.name for reader in READERS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="How many damaged files.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first one.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=names, help="Only this one; repeat for more.")
    parser.add_argument("--out", type=Path, help="Write counts and faults to this JSON file, again and again.")
    options = parser.parse_args()
    chosen = options.reader or names
    counts: Counter[str] = Counter()
    faults: dict[str, dict[str, Any]] = {}
    started = time.monotonic()

    def tell(line: dict[str, Any]) -> None:
        if "counts" in line:
            counts.update(line["counts"])
        else:
            key = f"{line['reader']}: {line['outcome']} {line.get('type', '')} at {line.get('where', '?')}"
            if key not in faults:
                faults[key] = {**line, "times": 0}
                print(f"{key}, number {line['number']}: {line.get('message', '')}", flush=True)
            faults[key]["times"] += 1
        if options.out is not None:
            seconds = time.monotonic() - started
            told = {
                "seed": options.seed,
                "seconds": seconds,
                "files": sum(counts.values()),
                "counts": counts,
                "faults": faults,
            }
            options.out.write_text(json.dumps(told, indent=1))

    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        number, last = options.first, options.first + options.files
        while number < last:
            number = _run(Path(folder), chosen, options.seed, number, last, tell)
    _table(chosen, counts)
    print(f"{sum(counts.values())} files in {time.monotonic() - started:.0f} s; {len(faults)} different faults")
    sys.exit(bool(faults))


def _run(folder: Path, names: list[str], seed: int, first: int, last: int, tell: Tell) -> int:
    """Let a process read files from ``first`` on; return the number of the file to go on with."""
    progress = folder / "progress"
    progress.write_bytes(struct.pack("<q", first - 1))
    given = (folder / f"files-{first}", ",".join(names), seed, first, last, progress)
    command = [sys.executable, "-m", "benchmarks.fuzz.worker", *map(str, given)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        _listen(process, progress, first, tell)
        code = process.wait()
    if code == 0:
        return last
    at: int = struct.unpack("<q", progress.read_bytes())[0]
    if at < first:
        raise SystemExit(f"the process ended with {code} before its first file; run {' '.join(command)} to see why")
    reader = names[at % len(names)]
    outcome = "hang" if code == -9 else "crash"
    tell({"number": at, "reader": reader, "outcome": outcome, "type": f"exit code {code}", "where": "the process"})
    # What this process had counted since its last report, fewer than 200 files, is lost.
    tell({"counts": {f"{reader} {outcome}": 1}})
    return at + 1


def _listen(process: subprocess.Popen[bytes], progress: Path, first: int, tell: Tell) -> None:
    """Take in what a process tells until it ends; end it if it does not go on."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    rest, at, since = b"", first - 1, time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(1.0):
                chunk = process.stdout.read()
                if chunk == b"":
                    return
                *lines, rest = (rest + (chunk or b"")).split(b"\n")
                for line in lines:
                    if line.startswith(b"{"):
                        tell(json.loads(line))
            now = struct.unpack("<q", progress.read_bytes())[0]
            if now != at:
                at, since = now, time.monotonic()
            elif time.monotonic() - since > (PATIENCE_SECONDS if at >= first else START_SECONDS):
                process.kill()


def _table(names: list[str], counts: Counter[str]) -> None:
    columns = ("accepted", "refused", *FAULTS)
    print(f"{'':14s}" + "".join(f"{column:>12s}" for column in columns))
    for name in (*names, "all"):
        of = [
            sum(n for key, n in counts.items() if key.endswith(f" {c}") and name in ("all", key.partition(" ")[0]))
            for c in columns
        ]
        print(f"{name:14s}" + "".join(f"{n:>12d}" for n in of))


if __name__ == "__main__":
    main()
