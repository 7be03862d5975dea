"""When a run is saved, and what of it: after each epoch, in the middle of one, and when the best weights are new."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from trady.model.eager import uncompiled_name
from trady.ops.quantized import is_quantized
from trady.training.checkpoint import Checkpoint, save_checkpoint
from trady.training.metrics import EpochMetrics, best_of
from trady.training.run_folder import RunFolder
from trady.training.settings import Settings
from trady.training.state import State, optimizer_to_state
from trady.training.trainer import Trainer
from trady.training.within_epoch import EpochSums, state_names


@dataclass(frozen=True)
class Saving:
    """When a run is saved.

    Attributes:
        every_seconds: How often in the middle of an epoch; ``None`` saves there only when the run is to stop.
        best: Whether the weights of the best epoch are kept.
    """

    every_seconds: float | None = None
    best: bool = False


@dataclass
class Saver:
    """Writes the checkpoints of a run.

    Attributes:
        folder: Where; ``None`` writes nothing.
        saving: When.
        settings: What the run was started with.
        data: What its data is (:func:`trady.training.data.identity.identity`).
        model: Fingerprint of the untouched model.
        structure: The same without its weights.
        trainer: What is trained.
        optimizer: Updates it.
        saved_step: Optimizer steps that the checkpoint has; 0 while there is none.
    """

    folder: RunFolder | None
    saving: Saving
    settings: Settings
    data: Mapping[str, Any] | None
    model: str
    structure: str
    trainer: Trainer
    optimizer: torch.optim.Optimizer
    saved_step: int = 0
    _saved_at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save the middle of an epoch."""
        every = self.saving.every_seconds
        return every is not None and time.monotonic() - self._saved_at >= every

    def within(self, sums: EpochSums, random: State | None) -> None:
        """Save the middle of an epoch; all processes at the same step.

        Args:
            sums: Where it stands.
            random: The random numbers that come next; those of now by default.
        """
        if sums.batches:
            states = gather_object([sums.to_state(random)])
            self._save(sums.epoch - 1, sums.steps, dict(zip(state_names(len(states)), states, strict=True)))

    def epoch(self, history: Sequence[EpochMetrics]) -> None:
        """Save the end of an epoch: its metrics, the checkpoint, and the weights if none were better."""
        if self.folder is None:
            return
        self.folder.append(history[-1])
        self._save(history[-1].epoch, history[-1].step, {})
        self.best(history)

    def best(self, history: Sequence[EpochMetrics]) -> None:
        """Keep the weights if the last epoch is the best; not if they are kept already, as after a resume."""
        if self.folder is None or not self.saving.best or not history:
            return
        best = best_of(history)
        if best == history[-1].epoch and best != self.folder.best_epoch():
            delta = self.trainer.delta()  # brings the weights up to date
            weights = all_weights(self.trainer.model)
            self.folder.write_best(best, weights, delta)

    def _save(self, epoch: int, step: int, more: Mapping[str, State]) -> None:
        if self.folder is None:
            return
        states = {"trainer": self.trainer.state(), "optimizer": optimizer_to_state(self.optimizer), **more}
        settings = self.settings.to_json()
        made = Checkpoint(epoch, step, settings, self.model, states, self.data, self.structure)
        save_checkpoint(self.folder.checkpoint, made)
        self.saved_step, self._saved_at = step, time.monotonic()


def all_weights(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Return all weights of a model under their plain names; ``None`` where some are stored quantised."""
    if any(is_quantized(parameter) for parameter in model.parameters()):
        return None
    return {uncompiled_name(name): tensor for name, tensor in model.state_dict().items()}
