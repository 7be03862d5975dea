"""Workers that tell which device they see."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")

from trady.compare.execute import Workplace

#: A module that a worker imports: it notes what the worker sees, and whether torch had looked before.
TELLS = """
import os, pathlib, torch
seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
pathlib.Path(f"{os.getpid()}.tmp").write_text(f"{seen} {torch.cuda.is_initialized()}")
os.replace(f"{os.getpid()}.tmp", f"{os.getpid()}.seen")
"""


def workplace(folder: Path) -> Workplace:
    (folder / "tells_what_it_sees.py").write_text(TELLS)
    return Workplace(folder / "out", "results", 1, ("tells_what_it_sees",), (str(folder),), folder)


def told(folder: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 120
    while len(found := sorted(folder.glob("*.seen"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return sorted(path.read_text() for path in found)
