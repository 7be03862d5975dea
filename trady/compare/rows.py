"""One row for each cell, from its folder."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trady.compare.cell_folder import CellFolder, Status
from trady.records.schema import Natural, Positive


@dataclass(frozen=True)
class Row:
    """A cell and its results; fields that do not apply to its status are ``None``.

    Attributes:
        model: Its name in the matrix.
        dataset: Its name in the matrix.
        budget: Its name; ``None`` for a policy that takes none.
        amount: As text, e.g. ``elements:27946``.
        policy: Name of the policy.
        seed: Of everything random.
        status: ``done``, ``infeasible``, ``failed``, ``started`` or ``missing``.
        digest: Digest of the cell's settings.
        message: Why it is not done.
        accuracy: Top-1 after the last epoch, 0 to 1.
        best_accuracy: The highest after any epoch.
        train_loss: Mean of the last epoch.
        evaluation_loss: After the last epoch.
        epochs: How many.
        steps: Of the optimizer.
        seconds: Time over all epochs, evaluation included.
        step_seconds: Median over the epochs of an epoch's mean step.
        peak_bytes: The highest measured peak of a step.
        saved_bytes: The most that a measured step kept between forward and backward.
        trainable_parameters: The most elements that an epoch updated.
        weight_sparsity: Share of the weights' gradient not computed, mean over the draws.
        activation_sparsity: Share of the activations not kept.
        flops_reduction: Share of the weight gradients' operations not done.
        ranking: Where the ranking of the layers came from.
        pool_layers: Layers that channels were drawn from.
        device: What it ran on: a GPU's name, or the kind of processor.
        threads: Of torch.
        torch: Version of torch.
        trady: Version of trady.
        settings: Those that the matrix gives, as JSON values.
    """

    model: str
    dataset: str
    budget: str | None
    amount: str | None
    policy: str
    seed: int
    status: str
    digest: str
    message: str | None = None
    accuracy: float | None = None
    best_accuracy: float | None = None
    train_loss: float | None = None
    evaluation_loss: float | None = None
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    trainable_parameters: int | None = None
    weight_sparsity: float | None = None
    activation_sparsity: float | None = None
    flops_reduction: float | None = None
    ranking: str | None = None
    pool_layers: int | None = None
    device: str | None = None
    threads: int | None = None
    torch: str | None = None
    trady: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)

    @property
    def done(self) -> bool:
        """Whether it has an accuracy."""
        return self.status == Status.DONE.value


def make_row(folder: CellFolder) -> Row:
    """Return the row of a cell, from its folder."""
    cell, status = folder.cell, folder.status()
    row = Row(
        model=cell.model,
        dataset=cell.dataset,
        budget=cell.budget,
        amount=cell.amount,
        policy=cell.policy,
        seed=cell.seed,
        status=status.value,
        digest=cell.digest,
        settings=dict(cell.settings),
    )
    if status is Status.DONE:
        return replace(row, **_figures(folder))
    if status in (Status.FAILED, Status.INFEASIBLE):
        return replace(row, message=folder.failure().message)
    return row


@dataclass(frozen=True)
class _SettingsRecord:
    """Of the settings in ``result.json``."""

    batch_size: Positive


@dataclass(frozen=True)
class _ResultRecord:
    """Of ``result.json``, what a row shows."""

    accuracy: float
    best_accuracy: float
    train_loss: float
    epochs: Positive
    steps: Natural
    seconds: float
    peak_bytes: Natural
    saved_bytes: Natural
    trainable_parameters: Natural
    settings: _SettingsRecord


@dataclass(frozen=True)
class _PlanRecord:
    """Of ``plan.json``, what a row shows; one of the head alone has little of it."""

    weight_sparsity: float | None = None
    activation_sparsity: float | None = None
    flops_reduction: float | None = None
    ranking: str | None = None
    pool: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _MachineRecord:
    """Of ``cell.json``, what the cell ran on."""

    device: str | None = None
    threads: int | None = None
    torch: str | None = None
    trady: str | None = None


@dataclass(frozen=True)
class _CellRecord:
    """Of ``cell.json``."""

    machine: _MachineRecord = _MachineRecord()


def _figures(folder: CellFolder) -> dict[str, Any]:
    result, plan = folder.load(_ResultRecord, folder.run.result), folder.load(_PlanRecord, folder.run.plan)
    machine = folder.load(_CellRecord, folder.identity).machine
    history = folder.run.history(result.epochs - 1)
    return {
        **{name: value for name, value in vars(result).items() if name != "settings"},
        **{name: value for name, value in vars(plan).items() if name != "pool"},
        **vars(machine),
        "pool_layers": None if plan.pool is None else len(plan.pool),
        "evaluation_loss": history[-1].evaluation_loss,
        "step_seconds": statistics.median(result.settings.batch_size / epoch.samples_per_second for epoch in history),
    }
