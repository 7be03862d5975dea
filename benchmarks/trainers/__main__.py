"""Other people's trainers inside a budget, feature by feature: do they end where plain training ends?

A cell is the largest difference of a weight from plain training of the same tensors (for resume, from the unbroken run
too), or why there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from benchmarks.options import add_json, console_for, main, write_json
from benchmarks.trainers import scripts
from benchmarks.trainers.builds import BUILDS
from benchmarks.trainers.checks import FEATURES, Cell, cell

#: Lines of a script that change.
LINES = {
    "Lightning": "1: callbacks=[TradyCallback(budget=…)]",
    "Accelerate": "3: prepare, attach, register_for_checkpointing",
    "skorch": "3: prepare, attach, finish",
    "script of timm's or torchvision's kind": "3: prepare, attach, finish",
}


def table_of(cells: Sequence[Cell]) -> Table:
    """Show trainers by features."""
    features = list(dict.fromkeys(found.feature for found in cells))
    table = Table("trainer", "changed lines", *features)
    for trainer in dict.fromkeys(found.trainer for found in cells):
        mine = {found.feature: found for found in cells if found.trainer == trainer}
        row = [_text(mine[feature]) if feature in mine else "" for feature in features]
        table.add_row(escape(trainer), LINES.get(trainer, "1: trady.tune(trainer, budget=…)"), *row)
    return table


def _text(found: Cell) -> str:
    if found.error is None:
        return f"– {escape(found.says)}"
    return f"{found.error:.0e}" if found.right else f"[red]{found.error:.0e}[/red]"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the cells; fail where one ends elsewhere than plain training."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers", description=__doc__)
    names = [*BUILDS, *scripts.SCRIPTS]
    parser.add_argument("--trainer", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    features = list(dict.fromkeys([*FEATURES, *scripts.FEATURES]))
    parser.add_argument("--feature", nargs="+", metavar="NAME", choices=features, default=features)
    add_json(parser)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = console_for(chosen.json)
    tasks = [
        (trainer, feature)
        for trainer in chosen.trainer
        for feature in chosen.feature
        if feature in (scripts.FEATURES if trainer in scripts.SCRIPTS else FEATURES)
    ]
    cells = []
    for trainer, feature in track(tasks, "cells", console=Console(stderr=True), disable=not console.is_terminal):
        with contextlib.redirect_stdout(io.StringIO()):
            cells.append((scripts.cell if trainer in scripts.SCRIPTS else cell)(trainer, feature))
        if chosen.json != "-":  # a long run leaves what it has
            write_json(chosen.json, {"cells": [asdict(found) for found in cells]})
    console.print(table_of(cells))
    wrong = sum(not found.right for found in cells)
    console.print(f"{len(cells)} cells, {sum(found.error is not None for found in cells)} run, {wrong} not as plain")
    write_json(chosen.json, {"cells": [asdict(found) for found in cells]})
    return int(bool(wrong))


if __name__ == "__main__":
    main(run)
