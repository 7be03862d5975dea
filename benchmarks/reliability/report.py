"""What the trials say, as a table and as the page of the documentation."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime

import torch

from benchmarks.reliability.task import SETUPS
from benchmarks.reliability.trials import Tally

COLUMNS = (
    "what happens",
    "trials",
    "in training",
    "a file half written",
    "went on inside an epoch",
    "refused",
    "runs ended",
    "lost",
    "different",
    "left over",
    "wrong exit",
    "slowest to leave",
)

_EXPLANATION = """\
A trial stops a small run somehow, at a random moment: one in three lies anywhere between the start of its process and
its end, two in three after its first step. It is started again with `resume=True`, and stopped again, until it ends.
Each run is one of these, with a checkpoint every 0.05 s and after each epoch:

{setups}

- **In training**: the process had done a step when it was stopped. The others were planning or ending.
- **A file half written**: a temporary file was there afterwards; the next start removes it.
- **Went on inside an epoch**: the checkpoint was of the middle of an epoch.
- **Lost**: a checkpoint that was complete is gone or cannot be read, or the run went on elsewhere than after it. After
  SIGTERM and SIGHUP every step that was done must be in it.
- **Different**: the weights (`model`, `best`, `delta`) or the metrics, times aside, are not those of a run that nobody
  stopped, bit for bit.
- **Left over**: a file that the other run does not have.
- **Wrong exit**: an exit code that should not be, no message, or more than 10 s to leave.

Of two processes that resume one run, one is refused and is told who works there; the other one ends as if alone. A disk
fills up in the middle of any file, the process ends with an error, room is made, and the run goes on. Processes are
forked from one that has imported everything, so that a trial takes seconds. A kill does not empty the system's cache,
so none of this shows what a power cut does: for that, files and folders are flushed before they are renamed.
"""


def row(tally: Tally) -> tuple[str, ...]:
    """Return the cells of one kind of trial."""
    counts = (
        tally.trials,
        tally.training,
        tally.writing,
        tally.within,
        tally.refused,
        tally.ended,
        tally.lost,
        tally.different,
        tally.orphans,
        tally.mistakes,
    )
    slowest = f"{tally.slowest_seconds:.2f} s" if tally.slowest_seconds else ""
    return (tally.kind, *map(str, counts), slowest)


def page(tallies: Sequence[Tally], asked: str, seed: int, seconds: float, when: datetime) -> str:
    """Return the page of the documentation."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *map(row, tallies))]
    bad = sum(tally.bad for tally in tallies)
    verdict = "Nothing went wrong." if not bad else f"Wrong: {bad}."
    return "\n".join(
        [
            "# Reliability",
            "",
            f"Measured on {when:%Y-%m-%d}, in {seconds / 60:.0f} minutes, with torch {torch.__version__} on "
            f"{platform.system()} {platform.machine()}, seed {seed}. This page is written by",
            "",
            "```bash",
            f"python -m benchmarks.reliability {asked} --write",
            "```",
            "",
            *lines,
            "",
            verdict,
            "",
            _EXPLANATION.format(setups="\n".join(f"- {name}" for name in SETUPS)),
        ]
    )
