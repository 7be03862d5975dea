"""The folder of a run: its files, and how they survive a kill at any instant."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trady.errors import CheckpointError, StateError
from trady.records.files import flush, write_json, write_lines, write_tensors
from trady.training.checkpoint import find_checkpoint, remove_leftovers
from trady.training.metrics import METRICS, EpochMetrics


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, under one folder."""

    path: Path

    @property
    def plan(self) -> Path:
        """What was decided before the first step."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The last complete checkpoint."""
        return self.path / "checkpoint"

    @property
    def model(self) -> Path:
        """All weights of the finished model."""
        return self.path / "model.safetensors"

    @property
    def delta(self) -> Path:
        """The changed channels only."""
        return self.path / "delta.safetensors"

    @property
    def result(self) -> Path:
        """The result; written last."""
        return self.path / "result.json"

    def check(self, *, resume: bool, overwrite: bool) -> bool:
        """Return whether there is a checkpoint to go on from; change nothing.

        Raises:
            StateError: There is a run already, and neither ``resume`` nor ``overwrite`` is given.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StateError(f"{self.path} is a file; name a folder for the run")
        if resume and overwrite:
            raise StateError("resume and overwrite exclude each other; give one of them")
        present = find_checkpoint(self.checkpoint) is not None
        if (present or self.result.exists()) and not (resume or overwrite):
            raise StateError(
                f"{self.path} holds a run already; go on with it by --resume (resume=True), "
                "replace it by --overwrite (overwrite=True), or name another folder"
            )
        return present and resume

    def begin(self, *, keep: bool) -> None:
        """Make the folder, and remove what an earlier run left in it unless that run is resumed."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not keep:
            self._clear()
        remove_leftovers(self.checkpoint)

    def where_it_stands(self) -> str:
        """Return what to tell a user whose run was interrupted."""
        if find_checkpoint(self.checkpoint) is None:
            return f"stopped before the first epoch was done; there is nothing to resume in {self.path}"
        return f"stopped; the last checkpoint is kept in {self.checkpoint}: go on with --resume"

    def _clear(self) -> None:
        for path in (self.result, self.model, self.delta, self.plan, self.metrics):
            path.unlink(missing_ok=True)
        while (place := find_checkpoint(self.checkpoint)) is not None:
            shutil.rmtree(place)

    def append(self, metrics: EpochMetrics) -> None:
        """Append an epoch to the metrics, and flush it to disk."""
        line = (json.dumps(metrics.to_json(), allow_nan=False) + "\n").encode()
        descriptor = os.open(self.metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def history(self, last_epoch: int) -> list[EpochMetrics]:
        """Return the metrics of the epochs up to ``last_epoch``."""
        # A kill may have cut a line short; it is always the last.
        lines = METRICS.read_lines(EpochMetrics, self.metrics, until_damage=True) if self.metrics.exists() else []
        history = [epoch for epoch in lines if epoch.epoch <= last_epoch]
        if len(history) != last_epoch + 1 or any(epoch.epoch != at for at, epoch in enumerate(history)):
            raise CheckpointError(
                f"{self.metrics} does not have the epochs 0 to {last_epoch} that {self.checkpoint} says are "
                "done; start the run again with --overwrite"
            )
        return history

    def rewrite(self, history: Sequence[EpochMetrics]) -> None:
        """Cut the metrics to the epochs of ``history``."""
        write_lines(self.metrics, (json.dumps(epoch.to_json()) for epoch in history))

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write ``plan.json``."""
        write_json(self.plan, plan)

    def write_model(self, weights: Mapping[str, torch.Tensor] | None, delta: Mapping[str, torch.Tensor] | None) -> None:
        """Write ``model.safetensors``, unless weights are quantised, and ``delta.safetensors`` if there is one."""
        if weights is not None:
            aliases = _aliases(weights)
            kept = {name: tensor for name, tensor in weights.items() if name not in aliases}
            write_tensors(self.model, kept, {"format": "pt", **aliases})
        if delta is not None:
            write_tensors(self.delta, delta, {"format": "trady-delta"})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``."""
        write_json(self.result, result)
        flush(self.path)


def _aliases(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return, for tied weights that are stored under another name, that name."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        if not tensor.numel():
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases
