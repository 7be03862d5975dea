"""One cell: a training to its accuracy, or the memory and time of a step. A cell runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import default_collate

import trady
from benchmarks.frontier.methods import CLIPPED_RATE, METHODS, Method, Plain, Tuned, forward_only_step
from benchmarks.frontier.tasks import TASKS, Folders, FrontierTask
from trady.errors import BudgetError
from trady.estimates.checkpointing import checkpoint_blocks
from trady.estimates.heads import train_with_fixed_statistics
from trady.training.batch import cross_entropy, forward, split_batch
from trady.training.data.loaders import evaluation_batches, start_epoch, training_batches
from trady.training.evaluate import evaluate
from trady.training.objective import TopOne
from trady.training.optimizers import optimizer_factory
from trady.training.randomness import own_randomness, seed_epoch
from trady.training.run import finetune
from trady.training.schedule import make_schedule

Stage = Literal["tune", "final", "cost"]

#: Gradients of plain methods are clipped to this norm, as trady clips that of the head.
MAX_NORM = 2.0
#: Samples a forward and backward pass of trady on texts: the same gradient, and room for more channels.
MICRO_BATCH: Mapping[str, int | Literal["auto", "most"]] = {"image": "auto", "text": 8}
#: Limit of a channel's gradient on texts: the default of trady.finetune.
CHANNEL_CLIP = 0.1
#: Draws of channels in an epoch, where epochs are few.
DRAWS = 4
TIMED_ROUNDS = 5


@dataclass(frozen=True)
class Cell:
    """What is run.

    Attributes:
        task: A key of ``TASKS``.
        method: A key of ``METHODS``.
        stage: ``tune`` trains on a part of the training data and judges by the rest of it, ``final`` trains on all of
            it, ``cost`` measures a step.
        rate: One of the method's ``rates``; 0 for ``cost``.
        seed: Seed of order, dropout and draws.
        micro: For ``cost`` of plain methods: samples a forward and backward pass; 0 is the whole batch.
        checkpointing: For ``cost`` of plain methods: whether blocks are recomputed.
    """

    task: str
    method: str
    stage: Stage
    rate: float = 0.0
    seed: int = 0
    micro: int = 0
    checkpointing: bool = False

    @property
    def digest(self) -> str:
        """Name the cell by all that decides its result."""
        task, method = TASKS[self.task], METHODS[self.method]
        decides = [asdict(self), task.describe, method.optimizer[task.kind], method.name, "equation 8"]
        if isinstance(method.way, Tuned) and method.way.most:
            decides.append("most")
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def run_cell(cell: Cell, folders: Folders) -> dict[str, Any]:
    """Run a cell; what cannot be done is told in ``status``."""
    torch.set_num_threads(1)
    task, method = TASKS[cell.task], METHODS[cell.method]
    started = time.process_time()
    row: dict[str, Any] = {**asdict(cell), "digest": cell.digest, "status": "done"}
    try:
        with own_randomness():
            row |= _cost(cell, task, method, folders) if cell.stage == "cost" else _train(cell, task, method, folders)
    except (BudgetError, trady.errors.TrainingError) as error:
        row |= {"status": "infeasible", "message": str(error)}
    except trady.errors.TradyError as error:
        row |= {"status": "left out", "message": str(error)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return row | {"cpu_seconds": round(time.process_time() - started, 2), "device": device, "torch": torch.__version__}


def _train(cell: Cell, task: FrontierTask, method: Method, folders: Folders) -> dict[str, Any]:
    train, evaluation = task.split(folders, tune=cell.stage == "tune")
    model = task.model(folders)
    if isinstance(method.way, Tuned):
        budget = budget_of(method.way, task, folders)
        result = finetune(
            model,
            train,
            evaluation,
            budget=budget,
            policy=method.way.policy,
            epochs=task.epochs,
            out=None,
            batch_size=task.batch_size,
            lr=CLIPPED_RATE if task.kind == "image" else cell.rate,
            channel_clip=cell.rate if task.kind == "image" else CHANNEL_CLIP,
            optimizer=method.optimizer[task.kind],
            seed=cell.seed,
            draws_per_epoch=DRAWS,
            micro_batch=micro_batch_of(method.way, task),
            progress=False,
        )
        last = result.history[-1]
        return {
            "accuracy": result.accuracy,
            "train_loss": last.train_loss,
            "budget": budget,
            "trainable": round(fmean(epoch.trainable_parameters for epoch in result.history)),
            "peak_bytes": max(epoch.peak_bytes for epoch in result.history) - fixed_bytes(task, folders),
            "micro_batch": last.micro_batch,
        }
    return _train_plainly(cell, task, method, method.way, model, train, evaluation)


def _train_plainly(
    cell: Cell, task: FrontierTask, method: Method, way: Plain, model: nn.Module, train: Any, evaluation: Any
) -> dict[str, Any]:
    """Train in plain PyTorch, with the schedule, order and clipping that trady's own loop has."""
    accelerator = Accelerator()
    way.arm(task, model)
    model.to(accelerator.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = accelerator.prepare_data_loader(training_batches(train, task.batch_size, cell.seed))
    schedule = make_schedule(cell.rate, task.epochs, len(batches), None)
    optimizer = optimizer_factory(method.optimizer[task.kind], cell.rate, 0.0, 0.0)(parameters)
    step, total, examples = 0, 0.0, 0
    for epoch in range(task.epochs):
        seed_epoch(cell.seed, epoch)
        start_epoch(batches, epoch)
        train_with_fixed_statistics(model)
        total, examples = 0.0, 0
        for batch in batches:
            inputs, labels = split_batch(batch)
            compute = partial(_loss, model, inputs, labels)
            if way.forward_only:
                loss = forward_only_step(parameters, compute, schedule.rate(step), 1000 * cell.seed + step)
            else:
                loss = _backward_step(parameters, compute, optimizer, schedule.rate(step))
            if not loss < float("inf"):
                raise trady.errors.TrainingError(f"the loss became {loss} at a rate of {cell.rate}")
            step, total, examples = step + 1, total + loss * len(labels), examples + len(labels)
    judged = accelerator.prepare_data_loader(evaluation_batches(evaluation, task.batch_size))
    accuracy = evaluate(model, judged, TopOne(), accelerator, "no").accuracy
    return {
        "accuracy": accuracy,
        "train_loss": total / examples,
        "trainable": sum(parameter.numel() for parameter in parameters),
    }


def _loss(model: nn.Module, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(forward(model, inputs), labels)


def _backward_step(
    parameters: list[nn.Parameter],
    compute: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    rate: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = compute()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# -- memory and time ---------------------------------------------------------------------------------


def example_of(task: FrontierTask, folders: Folders) -> tuple[Any, torch.Tensor]:
    """Return the first batch of the training data, as (inputs, labels)."""
    train, _ = task.data(folders)
    return split_batch(default_collate([train[index] for index in range(task.batch_size)]))


def inference_ledger(task: FrontierTask, folders: Folders) -> trady.Ledger:
    """Measure an inference pass of the untouched model on a batch."""
    model = task.model(folders).eval()
    inputs, _ = example_of(task, folders)
    with torch.no_grad():
        return trady.measure(lambda: forward(model, inputs), model, inference=False)


def fixed_bytes(task: FrontierTask, folders: Folders) -> int:
    """Weights and batch, which every peak is told without."""
    ledger = inference_ledger(task, folders)
    labels = example_of(task, folders)[1].nbytes
    return ledger.peak_bytes - ledger.working_peak_bytes + labels


def budget_of(way: Tuned, task: FrontierTask, folders: Folders) -> str:
    """Return the peak that a ratio means."""
    working = inference_ledger(task, folders).working_peak_bytes
    return f"peak:{int(fixed_bytes(task, folders) + way.ratio * working)} B"


def micro_batch_of(way: Tuned, task: FrontierTask) -> int | Literal["auto", "most"]:
    """Return how trady cuts a batch."""
    return "most" if way.most else MICRO_BATCH[task.kind]


def _cost(cell: Cell, task: FrontierTask, method: Method, folders: Folders) -> dict[str, Any]:
    inputs, labels = example_of(task, folders)
    inference = inference_ledger(task, folders).working_peak_bytes
    whole = task.model(folders).requires_grad_(True)
    train_with_fixed_statistics(whole)
    full = _plain_step(whole, inputs, labels, 0, "adamw")
    if isinstance(method.way, Tuned):
        tuner, run = _tuned_step(task, method, method.way, inputs, labels, folders)
        ledger = tuner.ledger(run, inference=False)
        trainable = sum(p.numel() for p in tuner.parameters())
    else:
        model = task.model(folders)
        if cell.checkpointing:
            checkpoint_blocks(model, task.block_classes)
        method.way.arm(task, model)
        train_with_fixed_statistics(model)
        if method.way.forward_only:
            run = _forward_only(model, inputs, labels)
        else:
            run = _plain_step(model, inputs, labels, cell.micro, method.optimizer[task.kind])
        run()  # the optimizer's states are there from the second step on
        ledger = trady.measure(run, model, inference=False)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    times = [(_seconds(run), _seconds(full)) for _ in range(TIMED_ROUNDS)]
    return {
        "peak_bytes": ledger.working_peak_bytes,
        "inference_peak_bytes": inference,
        "step_cpu_seconds": median(ours for ours, _ in times),
        "step_over_full": median(ours / theirs for ours, theirs in times),
        "trainable": trainable,
    }


def _seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _parts(inputs: Any, labels: torch.Tensor, micro: int) -> list[tuple[Any, torch.Tensor]]:
    if not micro:
        return [(inputs, labels)]
    labels_of = labels.split(micro)
    if isinstance(inputs, dict):
        pieces = {name: value.split(micro) for name, value in inputs.items()}
        return [({name: piece[i] for name, piece in pieces.items()}, part) for i, part in enumerate(labels_of)]
    return list(zip(inputs.split(micro), labels_of, strict=True))


def _plain_step(model: nn.Module, inputs: Any, labels: torch.Tensor, micro: int, name: str) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_factory(name, 1e-6, 0.0, 0.0)(parameters)

    def run() -> None:
        for part, part_labels in _parts(inputs, labels, micro):
            (_loss(model, part, part_labels) * (len(part_labels) / len(labels))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _forward_only(model: nn.Module, inputs: Any, labels: torch.Tensor) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        forward_only_step(parameters, lambda: _loss(model, inputs, labels), 1e-9, 0)

    return run


def _tuned_step(
    task: FrontierTask, method: Method, way: Tuned, inputs: Any, labels: torch.Tensor, folders: Folders
) -> tuple[trady.Tuner, Callable[[], None]]:
    model = task.model(folders)
    optimizer = optimizer_factory(method.optimizer[task.kind], 1e-6, 0.0, 0.0)
    tuner = trady.prepare(
        model,
        inputs,
        budget=budget_of(way, task, folders),
        policy=way.policy,
        micro_batch=micro_batch_of(way, task),
        loss=lambda output: cross_entropy(output, labels),
    )
    model.train()
    attached = tuner.attach(optimizer(list(tuner.parameters())))
    micro = tuner.micro_batch or 0

    def run() -> None:
        for part, part_labels in _parts(inputs, labels, micro):
            (_loss(model, part, part_labels) * (len(part_labels) / len(labels))).backward()
        attached.step()
        attached.zero_grad()

    run()
    return tuner, run
