"""The layout of the package: what may import what (CONTRIBUTING.md shows the same as a drawing)."""

from __future__ import annotations

from pathlib import Path

import trady

ROOT = Path(trady.__file__).parent

#: What each package may import. What is named on the left is a folder of ``trady/`` or a file at its root.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "records": {"errors"},
    "report": {"errors"},
    "channels": {"errors"},
    "ops": {"errors"},
    "model": {"errors"},
    "optim": {"errors"},
    "ranking": {"channels", "records"},
    "memory": {"model", "ops", "records", "report"},
    "policies": {"channels", "ranking", "records"},
    "quantized": {"ops", "model"},
    "calls": {"ops", "quantized"},
    "trace": {"calls", "model", "quantized"},
    "analysis": {"trace", "calls", "channels", "ops", "model", "quantized"},
    "interception": {"analysis", "trace", "calls", "channels", "optim", "ops", "model", "quantized"},
}
