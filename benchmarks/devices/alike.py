"""Training in several processes beside the same training in one, and beside DistributedDataParallel: one thread each.

Every row is a model, a mode of recomputation, an optimizer and a number of passes a step. It trains on the same
global batches in one process and in several of gloo, in float64, so that only the order of sums differs. It is missed
where a loss is more than 1e-5 off (relative), where the weights of two processes differ in a bit, where other channels
train, or where a step averages other bytes than those of what trains, by more than 1 %. Times gate nothing.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import trady
from benchmarks.options import write_json
from benchmarks.trainers.builds import WORDS, bert, llama
from trady.planning.traffic import step_traffic

#: Samples of a step, all processes and passes together: cut evenly by 1, 2 and 4 processes and 1 and 3 passes.
SAMPLES, LENGTH = 12, 16
#: How far a loss and the bytes of a step may be off.
LOSS_BAR, BYTES_BAR = 1e-5, 0.01
#: Channels are drawn again after so many steps.
STEPS_A_DRAW = 10


class Cnn(nn.Module):
    """Three convolutions, one of them beside a short cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.second, self.norm, self.fc = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        x = torch.relu(self.norm(self.second(x)) + x)
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def _cnn() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Cnn()


MODELS: Mapping[str, Callable[[], nn.Module]] = {"cnn": _cnn, "minilm-like": bert, "llama-tiny": llama}
OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


@dataclass(frozen=True)
class Row:
    """What is trained, and how."""

    model: str
    recompute: str
    optimizer: str
    accumulation: int

    def batch(self, step: int, seed: int = 0) -> Any:
        """The global batch of a step."""
        numbers = torch.Generator().manual_seed(1000 * seed + step)
        if self.model == "cnn":
            return torch.randn(SAMPLES, 3, 16, 16, generator=numbers, dtype=torch.float64)
        return {"input_ids": torch.randint(4, WORDS + 4, (SAMPLES, LENGTH), generator=numbers)}


@dataclass
class Told:
    """What a process tells of a row."""

    losses: list[float]
    selections: list[str]
    digest: str
    averaged_bytes: list[int]
    planned_bytes: list[int]
    calls: list[int]
    step_seconds: float


def _shares(row: Row, step: int, rank: int, processes: int) -> Iterator[Any]:
    whole = row.batch(step)
    for part in range(row.accumulation):
        rows = slice(part * processes + rank, None, row.accumulation * processes)
        yield whole[rows] if isinstance(whole, Tensor) else {name: value[rows] for name, value in whole.items()}


def _backward(model: nn.Module, batch: Any, passes: int) -> float:
    output = model(batch) if isinstance(batch, Tensor) else model(**batch).logits
    loss = output.square().mean() / passes
    loss.backward()
    return float(loss.detach())


def trained(row: Row, steps: int, rank: int, processes: int) -> Told:
    """Train a row by channel in one of several processes."""
    model = MODELS[row.model]().double()
    tuner = trady.prepare(
        model, row.batch(0), budget="elements:6000", seed=3, ranking="structural", recompute=row.recompute,
        accumulates=row.accumulation > 1,
    )  # fmt: skip
    optimizer = tuner.attach(OPTIMIZERS[row.optimizer](tuner.parameters()))
    told, seconds = Told([], [], "", [], [], [], 0.0), []

    def step(number: int) -> None:
        loss = 0.0
        for part, batch in enumerate(_shares(row, number, rank, processes)):
            with nullcontext() if part == row.accumulation - 1 else tuner.no_sync():
                loss += _backward(model, batch, row.accumulation)
        optimizer.step()
        optimizer.zero_grad()
        told.losses.append(loss)

    for number in range(steps):
        if number % STEPS_A_DRAW == 0:
            tuner.resample(number // STEPS_A_DRAW)
            told.selections.append(tuner.selection.digest)
            head = [p for name, p in tuner.named_parameters() if not name.endswith(".channels")]
            planned = step_traffic(tuner.plan.table, tuner.selection, head, model, processes)
            told.planned_bytes.append(planned.averaged_bytes)
            ledger = tuner.ledger(partial(step, number), inference=False)
            told.averaged_bytes.append(ledger.averaged_bytes)
            told.calls.append(ledger.averaging_calls)
            continue
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    told.step_seconds = median(seconds) if seconds else 0.0
    told.digest = _digest(tuner.finish())
    return told


def wrapped(row: Row, steps: int, rank: int, processes: int) -> tuple[float, int]:
    """Train all weights with DistributedDataParallel; return the seconds of a step and the bytes of all gradients."""
    model = MODELS[row.model]().double()
    if row.model == "cnn":
        model.eval()  # statistics as under a tuner
    outer: nn.Module = DistributedDataParallel(model) if processes > 1 else model
    optimizer, seconds = OPTIMIZERS[row.optimizer](model.parameters()), []
    for number in range(steps):
        started = time.perf_counter()
        for part, batch in enumerate(_shares(row, number, rank, processes)):
            last = part == row.accumulation - 1
            with outer.no_sync() if isinstance(outer, DistributedDataParallel) and not last else nullcontext():
                _backward(outer, batch, row.accumulation)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return median(seconds), sum(p.nbytes for p in model.parameters())


def _digest(model: nn.Module) -> str:
    """Every bit of every weight."""
    import hashlib

    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rank(rank: int, processes: int, folder: str, rows: list[Row], steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        told = [(trained(row, steps, rank, processes), wrapped(row, min(steps, 10), rank, processes)) for row in rows]
        torch.save(told, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(processes: int, rows: list[Row], steps: int) -> list[list[tuple[Told, tuple[float, int]]]]:
    """Train rows in so many processes; return what each told, by rank, by row."""
    if processes == 1:
        torch.set_num_threads(1)
        return [[(trained(row, steps, 0, 1), wrapped(row, min(steps, 10), 0, 1)) for row in rows]]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (processes, folder, rows, steps), nprocs=processes)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(processes)]


@dataclass(frozen=True)
class Compared:
    """A row in several processes beside the same row in one.

    Attributes:
        row: What was trained.
        processes: How many processes.
        loss_error: The largest relative difference of the mean loss of a step.
        equal_weights: Whether all processes have the same weights, bit for bit.
        equal_selections: Whether all have drawn what one process draws.
        averaged_bytes: Of a step, at most.
        bytes_error: How far these are from the bytes of what trains, at most.
        calls: Collectives of a step, at most.
        step_seconds: Median of a step.
        ddp_seconds: Median of a step of all weights under DistributedDataParallel.
        ddp_bytes: Bytes of all gradients.
    """

    row: Row
    processes: int
    loss_error: float
    equal_weights: bool
    equal_selections: bool
    averaged_bytes: int
    bytes_error: float
    calls: int
    step_seconds: float
    ddp_seconds: float
    ddp_bytes: int

    @property
    def holds(self) -> bool:
        """Whether no bar is missed."""
        same = self.equal_weights and self.equal_selections
        return same and self.loss_error <= LOSS_BAR and self.bytes_error <= BYTES_BAR


def compared(row: Row, alone: Told, told: list[tuple[Told, tuple[float, int]]]) -> Compared:
    """Compare what several processes tell with what one told."""
    ranks = [each for each, _ in told]
    means = [sum(losses) / len(ranks) for losses in zip(*(each.losses for each in ranks), strict=True)]
    pairs = zip(means, alone.losses, strict=True)
    first, (ddp_seconds, ddp_bytes) = ranks[0], told[0][1]
    planned = zip(first.averaged_bytes, first.planned_bytes, strict=True)
    errors = [abs(averaged - expected) / max(expected, 1) for averaged, expected in planned]
    return Compared(
        row,
        len(ranks),
        max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs),
        len({each.digest for each in ranks}) == 1,
        all(each.selections == alone.selections for each in ranks),
        max(first.averaged_bytes),
        max(errors),
        max(first.calls),
        max(each.step_seconds for each in ranks),
        ddp_seconds,
        ddp_bytes,
    )


def _table(found: list[Compared]) -> Table:
    table = Table(title="Several processes of one thread, beside one process on the same global batch")
    for name in ("model", "recompute", "optimizer", "passes", "processes", "loss off", "weights", "channels",
                 "bytes a step", "calls", "of all gradients", "ms a step", "DDP, all weights: ms", ""):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "recompute", "optimizer") else "right")
    for each in found:
        row = each.row
        table.add_row(
            row.model, row.recompute, row.optimizer, str(row.accumulation), str(each.processes),
            f"{each.loss_error:.0e}", "equal" if each.equal_weights else "DIFFER",
            "equal" if each.equal_selections else "DIFFER", f"{each.averaged_bytes:,}", str(each.calls),
            f"{each.averaged_bytes / each.ddp_bytes:.1%}", f"{1000 * each.step_seconds:.1f}",
            f"{1000 * each.ddp_seconds:.1f}", "" if each.holds else "missed",
        )  # fmt: skip
    return table


def run(options: argparse.Namespace, console: Console) -> int:
    """Train, print and write; return the exit code."""
    choices = itertools.product(options.model, options.recompute, options.optimizer, options.accumulation)
    rows = [Row(*each) for each in choices]
    alone = in_processes(1, rows, options.steps)
    found = []
    for processes in (1, *options.processes):
        told = alone if processes == 1 else in_processes(processes, rows, options.steps)
        found += [compared(row, alone[0][i][0], [each[i] for each in told]) for i, row in enumerate(rows)]
    found.sort(key=lambda each: (rows.index(each.row), each.processes))
    console.print(_table(found))
    missed = [each for each in found if not each.holds]
    console.print(f"{len(found) - len(missed)} of {len(found)} hold over {options.steps} steps")
    write_json(options.json, {"steps": options.steps, "rows": [asdict(each) for each in found]})
    return 1 if missed else 0
