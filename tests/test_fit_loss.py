"""``trady fit`` with a loss of one's own, with cuBLAS' workspaces, and TraDy's smallest budget against every other."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trady
from tests.command import trady_here
from tests.fits import ledger_of
from tests.models import Residual, normal, seeded
from trady.errors import ModelError
from trady.memory import workspaces
from trady.planning.recomputation import Planner

#: What a module of a user's own has.
USERS_MODULE = """
import torch
from torch import nn

class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        return {"maps": self.body(x), "weight": x.mean()}

def make(classes):
    return Maps()

def far(output):
    return (output["maps"].repeat(1, 6, 1, 1).exp() - 1).square().mean() * output["weight"]
"""


class Maps(nn.Module):
    """Maps of what is where, in a dictionary: neither a loss nor class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"maps": self.body(x)}


def far(output: dict[str, Tensor]) -> Tensor:
    """A loss whose temporaries are larger than the model."""
    target = torch.zeros_like(output["maps"]).repeat(1, 6, 1, 1)
    return F.mse_loss(output["maps"].repeat(1, 6, 1, 1).exp(), target)


@pytest.mark.parametrize("method", ["full", "bitfit", "last-1"])
def test_the_peak_with_a_loss_of_ones_own_is_that_of_the_ledger(method: str) -> None:
    from benchmarks.tasks import Task

    x = normal(4, 3, 16, 16)
    task = Task(seeded(Maps), x, far)
    (told,) = trady.fit(task.model, x, methods=[method], loss=far, device="cpu", blocks=("Conv2d",)).rows
    assert told.refused is None
    measured = ledger_of(task, method, block_classes=("Conv2d",)).peak_bytes
    assert abs(told.peak_bytes / measured - 1) < 0.002
    (without,) = trady.fit(task.model, x, methods=[method], device="cpu", blocks=("Conv2d",)).rows
    assert without.peak_bytes < 0.9 * told.peak_bytes


def test_trady_is_planned_for_the_loss_and_the_search_computes_it_for_batches_of_any_size() -> None:
    x, model = normal(4, 3, 16, 16), seeded(Maps)
    report = trady.fit(model, x, methods=["full", "trady"], loss=far, memory="2 MiB", device="cpu")
    plain = trady.fit(model, x, methods=["trady"], device="cpu")
    assert report.rows[1].peak_bytes > plain.rows[0].peak_bytes
    assert (report["full"].largest_batch or 0) > 4
    more = trady.fit(model, x, methods=["full"], loss=far, batch_size=report["full"].largest_batch, device="cpu")
    assert more["full"].peak_bytes <= 2 * 2**20


def test_a_loss_that_cannot_be_is_refused_in_a_sentence() -> None:
    x, model = normal(2, 3, 8, 8), seeded(Maps)
    with pytest.raises(ModelError, match="loss is a int; it is a function of the model's output"):
        trady.fit(model, x, loss=3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no function 'nothing' in module 'math'"):
        trady.fit(model, x, loss="math:nothing")
    for wrong, said in ((lambda output: output["none"], "KeyError"), (lambda output: output["maps"], "a scalar")):
        (row,) = trady.fit(model, x, methods=["full"], loss=wrong, device="cpu").rows
        assert row.refused is not None
        assert said in row.refused


def test_the_command_takes_a_loss_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_maps.py").write_text(USERS_MODULE)
    monkeypatch.chdir(tmp_path)
    common = ("fit", "users_maps:make", "--image-size", 16, "--batch-size", 2, "--methods", "full", "--json")
    peaks = []
    for more in ((), ("--loss", "users_maps:far")):
        result = trady_here(*common, "--device", "cpu", *more)
        assert result.returncode == 0, result.stderr
        (row,) = json.loads(result.stdout)["rows"]
        peaks.append(row["peak_bytes"])
    assert peaks[1] > peaks[0]


def test_on_cuda_the_workspaces_of_cublas_are_counted_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = normal(4, 3, 9, 9), seeded(Residual)
    kept = 5 * 2**20
    monkeypatch.setattr(workspaces, "_HOPPER_BYTES", kept)
    if torch.cuda.is_available():
        kept = workspaces.workspace_bytes(torch.device("cuda"))
    sgd: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731 - the same on both devices
    options: dict[str, Any] = {"methods": ["full", "bitfit", "head", "trady"], "optimizer": sgd}
    cpu = trady.fit(model, x, device="cpu", **options)
    cuda = trady.fit(model, x, device="cuda", **options)
    assert [row.title for row in cpu.rows] == [row.title for row in cuda.rows]
    for one, other in zip(cpu.rows, cuda.rows, strict=True):
        assert one.refused == other.refused
        if one.refused is None:
            assert (other.peak_bytes - one.peak_bytes, other.parts["workspaces"]) == (kept, kept)
            assert "workspaces" not in one.parts
            assert one.channels == other.channels
    limit = kept + cpu.rows[-1].peak_bytes
    within = trady.fit(model, x, methods=["trady"], budgets=[limit], device="cuda").rows[-1]
    assert within.peak_bytes <= limit


class Block(nn.Module):
    """What a segment may be."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(16, 96), nn.Linear(96, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(F.gelu(self.inner(self.norm(x))))
        return out


@pytest.mark.parametrize("samples", [2, 24])
def test_the_smallest_budget_is_that_of_the_best_of_all_ways_to_recompute(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sets of segments, with neighbours joined or not, are simulated; none takes less."""
    searches: list[tuple[Planner, Any, Any]] = []
    search = Planner.least_time

    def remembered(self: Planner, timeline_of: Any, peak_of: Any, most: int) -> Any:
        searches.append((self, timeline_of, peak_of))
        return search(self, timeline_of, peak_of, most)

    monkeypatch.setattr(Planner, "least_time", remembered)
    x, model = normal(samples, 16), seeded(lambda: nn.Sequential(*(Block() for _ in range(3)), nn.Linear(16, 5)))
    told = trady.fit(model, x, methods=["trady"], optimizer="sgd", device="cpu").rows[0]
    least = told.budget_bytes
    assert least is not None
    planner, timeline_of, _ = searches[0]
    segments = planner._found.training
    assert 3 <= len(segments) <= 8
    subsets = itertools.chain.from_iterable(itertools.combinations(segments, n) for n in range(len(segments) + 1))
    ways = {planner._choose(list(subset), joined) for subset in subsets for joined in (1, 2, 4)}
    peaks = [timeline_of(way).least_bytes for way in ways]
    assert len(peaks) > 2 ** len(segments) / 2
    assert min(peaks) == least

    def possible(budget: int) -> bool:
        row = trady.fit(model, x, methods=["trady"], budgets=[budget], optimizer="sgd", device="cpu").rows[-1]
        return row.refused is None and row.peak_bytes <= budget

    assert [possible(budget) for budget in (least - 1, least, least + 1)] == [False, True, True]
