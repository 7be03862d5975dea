"""A small matrix of runs, and an engine in this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")

import torch
from torch import nn

from tests.small_task import small_net, write_npz
from trady.compare.cells import Job
from trady.compare.display import Display
from trady.compare.engine import Ended
from trady.compare.execute import Workplace, run_cell
from trady.compare.rows import Row
from trady.compare.run import Table, compare

MATRIX = """
policies = ["trady", "static-random", "head", "full"]
seeds = [0, 1]

[models]
small = "tests.small_task:small_net"

[datasets]
dots = "dots.npz"

[budgets]
ample = "elements:600"

[training]
epochs = 4
batch_size = 8
image_size = 12
"""

FULL_RATE = """
[[override]]
policy = "full"
lr = 0.05
"""

SHORT = (
    MATRIX.replace("seeds = [0, 1]", "seeds = [0]")
    .replace("epochs = 4", "epochs = 1")
    .replace('["trady", "static-random", "head", "full"]', '["head"]')
)


#: What a run measures of the clock; everything else must come out the same.
CLOCK = ("seconds", "step_seconds", "peak_bytes")


class Quiet(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def broken(classes: int) -> nn.Module:
    """A model that cannot be built."""
    raise RuntimeError("no such weights")


def deadly(classes: int) -> nn.Module:
    """A model that takes its process with it, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def deadly_once(classes: int) -> nn.Module:
    """The same, but only the first time."""
    mark = Path(os.environ["DEADLY_ONCE"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return small_net(classes)


def write_matrix(folder: Path, text: str = MATRIX + FULL_RATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_npz(folder / "dots.npz", train=24, test=12)
    (folder / "matrix.toml").write_text(text)
    return folder / "matrix.toml"


class Here:
    """An engine without other processes, where it is not the engine that is tested."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self.ended: list[Ended] = []

    def free(self) -> int:
        return 1 - len(self.ended)

    def start(self, job: Job) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(self.place.threads)
        self.ended.append(Ended(job, run_cell(job, self.place)))
        torch.set_num_threads(threads)

    def wait(self, timeout_seconds: float) -> list[Ended]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        pass


def run(matrix: Path, out: Path, **options: Any) -> Table:
    given = {"workers": 1, "threads": 1, "display": Quiet(), **options}
    return compare(matrix, out, **given)


def run_here(matrix: Path, out: Path, **options: Any) -> Table:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trady.compare.run._engine", lambda name, place, *_: Here(place))
        return run(matrix, out, **options)


def figures(rows: tuple[Row, ...] | list[Row]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.to_json().items() if name not in CLOCK} for row in rows]
