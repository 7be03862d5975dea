"""Runs on texts as commands in this process, and what they have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.command import trady_here

OPTIONS = ("--batch-size", 8, "--epochs", 1, "--lr", 0.01)
BUDGET = ("--budget", "1 MiB")


def finetune(model: object, data: object, out: Path, *more: object) -> str:
    done = trady_here("finetune", model, data, "--out", out, *OPTIONS, *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


def refused(*arguments: object) -> str:
    done = trady_here(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stderr


def predicted(*arguments: object) -> dict[str, Any]:
    done = trady_here("predict", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found
