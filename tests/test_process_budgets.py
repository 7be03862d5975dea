"""Budgets in process memory: read, measured, kept, resumed; and images that stay out of memory for them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import trady
from tests.fresh_process import afresh, linux
from tests.small_task import small_net
from trady.planning.budget import Budget, InfeasibleBudgetError, parse_budget
from trady.planning.request import Request
from trady.planning.scopes import PROCESS
from trady.planning.scopes.process import FIRST_STEP_BYTES, Process, ProcessMemory
from trady.process.resident import Resident
from trady.training.data.datasets import CENTERED, ImageDataset, Pixels
from trady.training.data.on_disk import PixelsOnDisk
from trady.training.process import in_process, process_now

MIB = 1 << 20

BATCH = torch.zeros(16, 3, 32, 32)


@pytest.fixture
def of_200_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has 200 MiB in memory, and is not changed by what is tested here."""
    monkeypatch.setattr("trady.planning.process_memory.make_ready", lambda: True)
    monkeypatch.setattr(
        "trady.planning.process_memory.resident", lambda: Resident(200 * MIB, 210 * MIB, 150 * MIB), raising=True
    )
    monkeypatch.setattr("trady.planning.process_memory.resident_bytes_of", lambda address, size: size)


# -- the budget itself


def test_a_process_budget_is_read_and_written() -> None:
    budget = parse_budget("process:400MiB")
    assert budget == Budget(PROCESS, 400 * MIB)
    assert str(budget) == "process:400 MiB"
    assert parse_budget(str(budget)) == budget
    assert budget.peak_bytes is None  # nobody has looked at the process yet


def test_the_room_of_a_process_is_what_it_predicts() -> None:
    memory = ProcessMemory(other_bytes=250 * MIB, tensor_bytes=20 * MIB, growth=1.1)
    for peak in (20 * MIB, 21 * MIB, 90 * MIB):
        assert abs(memory.room(memory.at_peak(peak)) - peak) <= 2
    assert memory.at_peak(20 * MIB) == 270 * MIB + FIRST_STEP_BYTES
    assert memory.at_peak(10 * MIB) == 260 * MIB + FIRST_STEP_BYTES
    assert memory.room(100 * MIB) == 0


@pytest.mark.usefixtures("of_200_mib")
def test_a_plan_keeps_the_budget_and_says_what_it_predicts() -> None:
    plan = trady.plan(small_net(), BATCH, budget="process:240 MiB")
    assert plan.budget is not None
    assert plan.predicted_peak_bytes is not None
    written = plan.to_json()
    assert written["budget"] == "process:240 MiB"
    measured = written["process"]["other_bytes"] + written["process"]["tensor_bytes"]
    assert 200 * MIB <= measured <= 204 * MIB  # rounded up, so that one that is started again has the same room
    assert plan.predicted_peak_bytes <= (plan.budget.peak_bytes or 0)
    assert written["predicted_process_bytes"] == plan.budget.scope.of_peak(plan.predicted_peak_bytes) <= 240 * MIB
    assert "predicted at its peak" in str(plan)


@pytest.mark.usefixtures("of_200_mib")
def test_less_memory_trains_fewer_channels() -> None:
    with pytest.raises(InfeasibleBudgetError) as refused:
        trady.plan(small_net(), BATCH, budget="process:1 MiB")
    least = refused.value.least_amount
    tight, loose = (trady.plan(small_net(), BATCH, budget=f"process:{least + more} B") for more in (0, 16 * MIB))
    assert tight.cost.channels < loose.cost.channels


@pytest.mark.usefixtures("of_200_mib")
def test_a_refusal_is_in_process_memory_and_what_it_says_to_type_is_possible() -> None:
    with pytest.raises(trady.BudgetError, match='budget "process:100 MiB" is below the minimum') as refused:
        trady.plan(small_net(), BATCH, budget="process:100 MiB")
    said = str(refused.value)
    less = said.split("Less would do: ")[1]
    assert float(less.split(" MiB")[0]) > 200  # the process, not the step alone
    typed = said.split('type budget="')[1].split('"')[0]
    assert trady.plan(small_net(), BATCH, budget=typed).budget == parse_budget(typed)


@pytest.mark.usefixtures("of_200_mib")
def test_a_plan_that_is_read_back_draws_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = trady.plan(small_net(), BATCH, budget="process:233 MiB")
    read = trady.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    grown = Resident(260 * MIB, 260 * MIB, 200 * MIB)
    monkeypatch.setattr("trady.planning.process_memory.resident", lambda: grown)
    with pytest.warns(trady.TradyWarning, match="had 60 MiB less in memory"):
        decision = Request(plan=read).decide(small_net(), BATCH)
    assert decision.draw(decision.start, 0, 0).digest == plan.selection.digest


def test_a_system_that_does_not_tell_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.planning.process_memory.make_ready", lambda: True)
    monkeypatch.setattr("trady.planning.process_memory.resident", lambda: None)
    with pytest.raises(trady.BudgetError, match=r"which this system does not say .*type budget=\"peak:300 MiB\""):
        trady.plan(small_net(), BATCH, budget="process:400 MiB")


@pytest.mark.usefixtures("of_200_mib")
def test_where_memory_is_kept_less_is_left_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.planning.process_memory.make_ready", lambda: False)
    plan = trady.plan(small_net(), BATCH, budget="process:240 MiB")
    assert plan.budget is not None
    assert isinstance(plan.budget.scope, Process)
    assert plan.budget.scope.memory is not None
    assert plan.budget.scope.memory.growth > 3


# -- a run

_RUN = """
import json, pathlib, sys, tempfile, warnings
import numpy as np
import trady
from tests.small_task import StopAfter, small_net
from trady.training.data.datasets import CENTERED, ImageDataset
from trady.training.data.on_disk import PixelsOnDisk
from trady.process.resident import resident

random = np.random.default_rng(0)
pixels = random.integers(0, 255, (3000, 24, 24, 3), dtype=np.uint8)
labels = random.integers(0, 3, 3000)
def data(): return ImageDataset(pixels.copy(), labels, 24, CENTERED)
def run(out, budget, train, **options):
    options = {"epochs": 2, "batch_size": 256, "seed": 1, "progress": False, **options}
    return trady.finetune(small_net(), train, data(), out=out, budget=budget, **options)
folder = pathlib.Path(tempfile.mkdtemp())
"""


@linux
def test_a_run_stays_in_its_budget_and_says_what_it_took() -> None:
    found = afresh(
        _RUN
        + """
from trady.planning.budget import InfeasibleBudgetError
try:
    run(None, "process:1 MiB", data())
except InfeasibleBudgetError as error:
    least = error.least_amount
given = data()
budget = least + (24 << 20)  # the first attempt has left something behind
result = run(folder / "run", f"process:{budget} B", given)
lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
plan = json.loads((folder / "run" / "plan.json").read_text())
written = json.loads((folder / "run" / "result.json").read_text())
print(json.dumps({
    "budget": budget, "predicted": plan["predicted_process_bytes"],
    "peaks": [line["process_peak_bytes"] for line in lines], "now": [line["process_bytes"] for line in lines],
    "result": written["process_peak_bytes"], "on disk": isinstance(given.pixels, PixelsOnDisk),
    "left": sorted(path.name for path in (folder / "run").iterdir()), "channels": lines[-1]["channels"],
}))
"""
    )
    assert found["predicted"] <= found["budget"]
    assert found["result"] == found["peaks"][-1] <= found["budget"]
    assert all(now <= peak for now, peak in zip(found["now"], found["peaks"], strict=True))
    assert abs(found["result"] / found["predicted"] - 1) < 0.1
    assert found["on disk"]
    assert found["left"] == [
        "best.safetensors",
        "checkpoint",
        "delta.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "plan.json",
        "result.json",
        "run.json",
    ]
    assert found["channels"] > 0


@linux
def test_a_resumed_run_has_the_room_that_it_began_with() -> None:
    found = afresh(
        _RUN
        + """
budget = "process:500 MiB"
try:
    run(folder / "run", budget, data(), progress=StopAfter(1))
except KeyboardInterrupt:
    pass
first = json.loads((folder / "run" / "plan.json").read_text())
ballast = np.ones(64 << 20, dtype=np.uint8)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    result = run(folder / "run", budget, data(), resume=True)
second = json.loads((folder / "run" / "plan.json").read_text())
texts = [str(w.message) for w in warned if issubclass(w.category, trady.TradyWarning)]
told = any("less in memory" in text for text in texts)
print(json.dumps([first["process"] == second["process"], len(result.history), told]))
"""
    )
    assert found == [True, 2, True]


@pytest.mark.usefixtures("of_200_mib")
def test_several_processes_are_refused() -> None:
    with pytest.raises(trady.BudgetError, match="is for one process, and 2 train together"):
        in_process(Request("process:400 MiB"), (), None, resumed=None, processes=2)


def test_other_budgets_leave_a_run_as_it_is(tmp_path: Path) -> None:
    data = ImageDataset(np.zeros((3000, 32, 32, 3), dtype=np.uint8), np.zeros(3000, dtype=np.int64), 32, CENTERED)
    request = Request("peak:400 MiB")
    assert in_process(request, (data,), tmp_path, resumed=tmp_path / "plan.json", processes=2) is request
    assert isinstance(data.pixels, np.ndarray)


def test_more_than_the_budget_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.training.process.resident", lambda: Resident(390 * MIB, 410 * MIB, 200 * MIB))
    budget = parse_budget("process:400 MiB")
    with pytest.warns(trady.TradyWarning, match=r"took 410\.0 MiB of the budget \"process:400 MiB\""):
        _, warned = process_now(budget, warned=False)
    assert process_now(budget, warned) == (Resident(390 * MIB, 410 * MIB, 200 * MIB), True)
    assert process_now(parse_budget("peak:1 MiB"), warned=False)[1] is False


# -- images on disk


@pytest.fixture
def images() -> Any:
    return np.random.default_rng(0).integers(0, 255, (50, 7, 5, 3), dtype=np.uint8)


def test_images_on_disk_are_those_in_memory(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trady.training.data.on_disk._PIECE_BYTES", 1000)  # more than one piece
    on_disk = PixelsOnDisk(images, tmp_path)
    order = np.array([3, 3, 49, 0, -1, -50, 17])
    assert np.array_equal(on_disk[order], images[order])
    assert (len(on_disk), on_disk.shape, on_disk.dtype) == (50, images.shape, images.dtype)
    assert list(tmp_path.iterdir()) == []
    for beyond in (50, -51):
        with pytest.raises(IndexError, match=f"image {beyond} of 50"):
            on_disk[np.array([beyond])]


def test_batches_are_the_same_bit_for_bit(images: Any, tmp_path: Path) -> None:
    labels = np.arange(50) % 3
    data = ImageDataset(images, labels, 16, CENTERED)
    wanted, wanted_labels = data.batch([4, 2, 9])
    part = data.head(20, seed=0).batch(range(20))[0]
    data.pixels = cast(Pixels, PixelsOnDisk(images, tmp_path))
    found, found_labels = data.batch([4, 2, 9])
    assert torch.equal(found, wanted)
    assert torch.equal(found_labels, wanted_labels)
    assert torch.equal(data.head(20, seed=0).batch(range(20))[0], part)


@linux
def test_a_loaders_worker_that_starts_afresh_reads_them(images: Any, tmp_path: Path) -> None:
    on_disk = PixelsOnDisk(images, tmp_path)
    again = pickle.loads(pickle.dumps(on_disk))  # noqa: S301
    assert np.array_equal(again[np.array([7, 8])], images[[7, 8]])


def test_a_folder_that_cannot_be_written_is_named(images: Any, tmp_path: Path) -> None:
    with pytest.raises(trady.DataError, match=r"decoded images cannot be written to .*nowhere"):
        PixelsOnDisk(images, tmp_path / "nowhere")
