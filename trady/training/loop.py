"""The loop: epochs, checkpoints, and the guard against losses that are not finite. It knows no policies."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trady.errors import CheckpointError, DataError, TradyError, TrainingError
from trady.model.eager import uncompiled_name
from trady.ops.quantized import is_quantized
from trady.planning.budget import Budget
from trady.training.batch import Loss, readable
from trady.training.checkpoint import (
    Checkpoint,
    check_settings,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from trady.training.data.loaders import Batches, start_epoch
from trady.training.evaluate import evaluate
from trady.training.interrupt import Interrupts
from trady.training.metrics import EpochMetrics
from trady.training.optimizers import OptimizerFactory
from trady.training.precision import autocast
from trady.training.process import process_now
from trady.training.progress import Display
from trady.training.randomness import seed_epoch
from trady.training.result import Result
from trady.training.run_folder import RunFolder
from trady.training.schedule import Schedule
from trady.training.settings import Settings
from trady.training.state import load_optimizer_state, optimizer_to_state
from trady.training.step import NotFiniteError, Stepper, StepResult
from trady.training.trainer import Trainer


@dataclass
class _Sums:
    """What an epoch adds up while it trains.

    Attributes:
        steps: Optimizer steps done since the run began.
        examples: Training examples of the epoch.
        loss: Sum of their losses.
        rate: Learning rate of the last step.
        peak_bytes: Highest peak of the measured steps.
        saved_bytes: Most bytes that these kept between forward and backward.
    """

    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    rate: float = 0.0
    peak_bytes: int = 0
    saved_bytes: int = 0


@dataclass
class Loop:
    """One run, from its first step or its last checkpoint to the result.

    Attributes:
        trainer: What is trained, and how.
        batches: Training batches.
        evaluation: Evaluation batches.
        accelerator: Where it runs.
        schedule: Rate of every step.
        settings: Written in each checkpoint.
        display: Told of every step.
        loss: From (output, labels) to a scalar.
        factory: Makes the optimizer.
        folder: The run folder; ``None`` writes nothing. Only the main process writes.
        observed: Batches (inputs, labels) that a policy is measured on.
        redraws: Steps of an epoch before which channels are drawn again.
        budget: What the run may take.
    """

    trainer: Trainer
    batches: Batches
    evaluation: Batches
    accelerator: Accelerator
    schedule: Schedule
    settings: Settings
    display: Display
    loss: Loss
    factory: OptimizerFactory
    folder: RunFolder | None
    observed: Iterable[Any] = ()
    redraws: frozenset[int] = frozenset()
    budget: Budget | None = None
    _finished: bool = field(default=False, init=False)
    _warned: bool = field(default=False, init=False)
    _interrupts: Interrupts = field(default_factory=Interrupts, init=False)

    def run(self, checkpoint: Path | None) -> Result:
        """Train all epochs that are not done yet, and write the results."""
        model = self._fingerprint()
        history: list[EpochMetrics] = []
        found = None if checkpoint is None else load_checkpoint(checkpoint)
        if found is not None and checkpoint is not None:
            history = self._restore(found, checkpoint, model)
        if (folder := self._writable()) is not None:
            folder.begin(keep=found is not None)
            if found is None:
                folder.write_plan(self.trainer.plan())
            else:
                folder.rewrite(history)
        self.accelerator.wait_for_everyone()
        optimizer = self.trainer.attach(self.factory(self.trainer.parameters()))
        if found is not None:
            load_optimizer_state(optimizer, found.states["optimizer"])
        with self._interrupts:
            for epoch in range(len(history), self.settings.epochs):
                history.append(self._epoch(epoch, optimizer))
                self._write(history, optimizer, model)
                self._interrupts.check()
        return self._finish(history)

    def disarm(self) -> None:
        """Disarm the model, also after an error."""
        if not self._finished:
            with suppress(TradyError):
                self.trainer.finish()

    def _fingerprint(self) -> str:
        trained = {id(parameter) for parameter in self.trainer.parameters()}
        model = self.trainer.model
        head = frozenset(name for name, p in model.named_parameters() if id(p) in trained)
        everything = len(head) == sum(1 for _ in model.named_parameters())
        return fingerprint(model, frozenset(model.state_dict()) if everything else head)

    def _restore(self, checkpoint: Checkpoint, place: Path, model: str) -> list[EpochMetrics]:
        assert self.folder is not None
        check_settings(checkpoint, self.settings.to_json(), place)
        if checkpoint.model != model:
            raise CheckpointError(
                f"{place} is of another model ({checkpoint.model}, this one is {model}); resume with the "
                "model and the pretrained weights that the run was started with"
            )
        if set(checkpoint.states) != {"trainer", "optimizer"}:
            raise CheckpointError(
                f"{place} has states {sorted(checkpoint.states)}; start the run again with --overwrite"
            )
        history = self.folder.history(checkpoint.epoch)
        self.trainer.load_state(checkpoint.states["trainer"])
        return history

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> EpochMetrics:
        """Measure what the policy needs, train an epoch, and evaluate."""
        started = time.perf_counter()
        self.trainer.set_mode(training=self.settings.mode == "train")
        observing_seconds = self._observe(epoch)
        seed_epoch(self.settings.seed, epoch, self.accelerator.process_index)
        start_epoch(self.batches, epoch)
        self.trainer.start_epoch(epoch)
        sums = self._train(epoch, self._stepper(optimizer))
        training_seconds = time.perf_counter() - started - observing_seconds
        accuracy, evaluation_loss = evaluate(
            self.trainer.model, self.evaluation, self.loss, self.accelerator, self.settings.mixed_precision
        )
        if not evaluation_loss < float("inf"):
            raise self._stopped(f"the evaluation loss became {evaluation_loss}", epoch, sums.steps - 1, sums.rate)
        drawn = self.trainer.draw()
        process, self._warned = process_now(self.budget, self._warned)
        metrics = EpochMetrics(
            epoch=epoch,
            step=sums.steps,
            train_loss=sums.loss / sums.examples,
            accuracy=accuracy,
            seconds=time.perf_counter() - started,
            peak_bytes=sums.peak_bytes,
            channels=drawn.channels,
            selection_hash=drawn.digest,
            evaluation_loss=evaluation_loss,
            saved_bytes=sums.saved_bytes,
            trainable_parameters=drawn.trainable_parameters,
            lr=sums.rate,
            samples_per_second=sums.examples * self.accelerator.num_processes / training_seconds,
            micro_batch=self.trainer.micro_batch,
            observing_seconds=observing_seconds,
            process_bytes=None if process is None else process.resident_bytes,
            process_peak_bytes=None if process is None else process.peak_bytes,
        )
        self.display.end_epoch(metrics)
        return metrics

    def _stepper(self, optimizer: torch.optim.Optimizer) -> Stepper:
        return Stepper(
            self.accelerator,
            self.trainer,
            optimizer,
            self.loss,
            self.settings.channel_clip,
            self.settings.max_grad_norm,
            self.settings.mixed_precision,
            self.trainer.micro_batch,
        )

    def _train(self, epoch: int, stepper: Stepper) -> _Sums:
        """Train on every batch; measure the memory of the first step after each draw."""
        first = epoch * len(self.batches)
        self.display.start_epoch(epoch, self.settings.epochs, len(self.batches))
        sums = _Sums()
        started = time.perf_counter()
        for step, batch in enumerate(readable(self.batches), start=first):
            sums.steps, sums.rate = step + 1, self.schedule.rate(step)
            try:
                if step - first in self.redraws:
                    self.trainer.redraw()
                if step == first or step - first in self.redraws:
                    result, peak, saved = self._measured(stepper, batch, sums.rate)
                    sums.peak_bytes, sums.saved_bytes = max(sums.peak_bytes, peak), max(sums.saved_bytes, saved)
                else:
                    result = stepper(batch, self.trainer.parameters(), sums.rate)
            except NotFiniteError as error:
                raise self._stopped(str(error), epoch, step, sums.rate) from error
            sums.examples += result.examples
            sums.loss += result.loss * result.examples
            speed = sums.examples / (time.perf_counter() - started)
            self.display.step(sums.loss / sums.examples, speed, sums.peak_bytes)
            self._interrupts.check()
        if not sums.examples:
            raise DataError("the training data gave no batch")
        return sums

    def _observe(self, epoch: int) -> float:
        """Measure what the next draw needs; return the seconds it took."""
        if not self.trainer.observation_due:
            return 0.0
        started = time.perf_counter()
        # Random numbers of the data are the same on every rank and in every epoch, so that measurements compare.
        seed_epoch(self.settings.seed, 0)
        tell = getattr(self.display, "observing", None)  # optional in displays of users

        def progress(done: int, passes: int) -> None:
            if tell is not None:
                tell(epoch, self.settings.epochs, done)
            self._interrupts.check()

        with autocast(self.accelerator.device, self.settings.mixed_precision):
            self.trainer.observe(self.observed, self.loss, progress)
        return time.perf_counter() - started

    def _measured(self, stepper: Stepper, batch: Any, rate: float) -> tuple[StepResult, int, int]:
        """Do an ordinary step, and measure it."""
        results: list[StepResult] = []
        ledger = self.trainer.ledger(lambda: results.append(stepper(batch, self.trainer.parameters(), rate)))
        (result,) = results
        return result, ledger.peak_bytes, ledger.saved_bytes

    def _stopped(self, what: str, epoch: int, step: int, rate: float) -> TrainingError:
        kept = (
            f"the checkpoint of epoch {epoch} is kept in {self.folder.checkpoint}"
            if self.folder is not None and epoch > 0
            else "there is no checkpoint yet"
        )
        return TrainingError(
            f"{what} in epoch {epoch + 1}, step {step + 1}, at a learning rate of {rate:.3g}; {kept}. "
            f"Try a lower rate (--lr {self.settings.lr / 4:.2g}), a longer warm-up (--warmup-epochs) "
            "or tighter clipping (--channel-clip, --max-grad-norm)"
        )

    def _write(self, history: list[EpochMetrics], optimizer: torch.optim.Optimizer, model: str) -> None:
        if (folder := self._writable()) is None:
            return
        last = history[-1]
        folder.append(last)
        states = {"trainer": self.trainer.state(), "optimizer": optimizer_to_state(optimizer)}
        save_checkpoint(
            folder.checkpoint,
            Checkpoint(last.epoch, last.step, self.settings.to_json(), model, states),
        )

    def _finish(self, history: list[EpochMetrics]) -> Result:
        plan, ranking, delta = self.trainer.plan(), self.trainer.ranking(), self.trainer.delta()
        model = self.trainer.finish()
        self._finished = True
        path = None if self.folder is None else self.folder.path
        seconds = sum(epoch.seconds for epoch in history)
        result = Result(model, self.settings.policy, self.settings.budget, tuple(history), seconds, path, ranking)
        if (folder := self._writable()) is not None:
            folder.write_plan(plan)
            quantized = any(is_quantized(parameter) for parameter in model.parameters())
            weights = {uncompiled_name(name): t for name, t in model.state_dict().items()}
            folder.write_model(None if quantized else weights, delta)
            folder.write_result({**result.to_json(), "settings": self.settings.to_json()})
        return result

    def _writable(self) -> RunFolder | None:
        return self.folder if self.accelerator.is_main_process else None
