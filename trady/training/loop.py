"""The loop: epochs, checkpoints, and the guard against losses that are not finite. It knows no policies."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from trady.errors import CheckpointError, DataError, TradyError, TradyWarning, TrainingError
from trady.memory import Ledger
from trady.planning.budget import Budget
from trady.process.ranks import total
from trady.training.advice import Guessing, lower_rate
from trady.training.batch import readable
from trady.training.checkpoint import (
    Checkpoint,
    check_model,
    fingerprint,
    load_checkpoint,
)
from trady.training.data.loaders import Batches, read_epoch, start_epoch
from trady.training.evaluate import evaluate
from trady.training.interrupt import Interrupts, Stopped, agree_to_stop
from trady.training.metrics import EpochMetrics, has_stalled
from trady.training.more_epochs import going_on
from trady.training.objective import Objective
from trady.training.optimizers import OptimizerFactory
from trady.training.precision import autocast
from trady.training.process import process_now
from trady.training.progress import Display
from trady.training.provenance import Describer
from trady.training.randomness import random_state, seed_epoch, set_random_state
from trady.training.result import Result
from trady.training.run_folder import RunFolder, where_it_stands
from trady.training.saver import Saver, Saving, all_weights
from trady.training.schedule import Schedule
from trady.training.settings import Settings
from trady.training.state import State, load_optimizer_state
from trady.training.step import CapturedPass, NotFiniteError, Stepper, StepResult
from trady.training.trainer import Trainer
from trady.training.within_epoch import WITHIN, EpochSums, shared_by

#: After the last batch.
_NOTHING = object()

#: An epoch that is half done, and the random numbers that come next in it.
_Within = tuple[EpochSums, State | None]


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
        objective: The loss, and what is measured on the evaluation batches.
        factory: Makes the optimizer.
        folder: The run folder; ``None`` writes nothing. Only the main process writes.
        observed: Batches (inputs, labels) that a policy is measured on.
        redraws: Steps of an epoch before which channels are drawn again.
        saving: When checkpoints are written, beside those after each epoch.
        data: What the data is, written in each checkpoint; ``None`` is not compared.
        budget: What the run may take.
        capture: Whether forward and backward passes are recorded as CUDA graphs and replayed.
        warmup_epochs: Length of the warm-up, as it was given.
        usual_rate: Rate that the optimizer mostly trains with; ``None`` where loss or optimizer are the user's own.
        describer: Writes into the folder what the run is.
    """

    trainer: Trainer
    batches: Batches
    evaluation: Batches
    accelerator: Accelerator
    schedule: Schedule
    settings: Settings
    display: Display
    objective: Objective
    factory: OptimizerFactory
    folder: RunFolder | None
    observed: Iterable[Any] = ()
    redraws: frozenset[int] = frozenset()
    budget: Budget | None = None
    describer: Describer | None = None
    saving: Saving = field(default_factory=Saving)
    data: Mapping[str, Any] | None = None
    capture: bool = False
    warmup_epochs: float | None = None
    usual_rate: float | None = None
    _finished: bool = field(default=False, init=False)
    _warned: bool = field(default=False, init=False)
    _guessing: Guessing = field(default_factory=Guessing, init=False)
    _evaluated_at_once: int = field(default=0, init=False)
    _saver: Saver = field(init=False)
    _interrupts: Interrupts = field(init=False)
    _epoch_started: float = field(default=0.0, init=False)
    _captured: CapturedPass | None = field(default=None, init=False)

    def run(self, *, resume: bool, overwrite: bool = False) -> Result:
        """Train all epochs that are not done yet, and write the results.

        Args:
            resume: Go on from the folder's checkpoint, if there is one.
            overwrite: Replace the run that is in the folder.

        Raises:
            LockedError: Another process works in the folder.
            Stopped: SIGTERM or SIGHUP came; what was done is saved, and said on standard error.
        """
        folder = self._writable()
        with nullcontext() if folder is None else folder.alone():
            try:
                return self._run(resume, overwrite)
            except Stopped as stop:
                if self.accelerator.is_main_process:
                    print(where_it_stands(self.folder, stop.signal.name), file=sys.stderr)  # noqa: T201
                raise
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(str(stop) or where_it_stands(self.folder, "")) from None

    def _run(self, resume: bool, overwrite: bool) -> Result:
        model, structure = self._fingerprints()
        self.accelerator.wait_for_everyone()  # the folder is cleared up
        found = None
        if self.folder is not None and self.folder.check(resume=resume, overwrite=overwrite):
            found = load_checkpoint(self.folder.checkpoint)
        history, within = ([], None) if found is None else self._restore(found, model, structure)
        self.accelerator.wait_for_everyone()  # everybody has read it
        if (folder := self._writable()) is not None:
            folder.begin(keep=found is not None)
            plan = None if found is not None else self.trainer.plan()
            if self.describer is not None:
                self.describer.begin(folder, plan)
            if plan is None:
                folder.rewrite(history)
            else:
                folder.write_plan(plan)
        self.accelerator.wait_for_everyone()
        optimizer = self.trainer.attach(self.factory(self.trainer.parameters()))
        self.schedule = self.schedule.known_by(optimizer.param_groups)  # before a state of the run is loaded
        if found is not None:  # last: an optimizer that is attached may leave room for other channels
            self.trainer.load_state(found.states["trainer"])
            load_optimizer_state(optimizer, found.states["optimizer"])
        folder, saved_step = self._writable(), 0 if found is None else found.step
        self._saver = Saver(
            folder, self.saving, self.settings, self.data, model, structure, self.trainer, optimizer, saved_step
        )
        if found is not None and within is None:
            self._saver.best(history)
        self._interrupts = Interrupts(partial(where_it_stands, self.folder))  # no cycle: it would keep the optimizer
        with self._interrupts:
            for epoch in range(len(history), self.settings.epochs):
                if has_stalled(history, self.settings.patience):
                    break
                history.append(self._epoch(epoch, optimizer, within))
                self._saver.epoch(history)
                if agree_to_stop(self._interrupts, self.accelerator)[1]:
                    self._interrupts.check()
                within = None
            return self._finish(history)

    def disarm(self) -> None:
        """Disarm the model, also after an error."""
        if not self._finished:
            with suppress(TradyError):
                self.trainer.finish()

    def _fingerprints(self) -> tuple[str, str]:
        """Name the model, without what trains everywhere; and its layers without any weights."""
        trained = {id(parameter) for parameter in self.trainer.parameters()}
        model = self.trainer.model
        head = frozenset(name for name, p in model.named_parameters() if id(p) in trained)
        everything = len(head) == sum(1 for _ in model.named_parameters())
        structure = fingerprint(model, frozenset(model.state_dict()))
        return structure if everything else fingerprint(model, head), structure

    def _restore(self, checkpoint: Checkpoint, model: str, structure: str) -> tuple[list[EpochMetrics], _Within | None]:
        assert self.folder is not None
        place = self.folder.checkpoint
        self.settings, self.schedule = going_on(
            checkpoint, self.settings, self.schedule, self.warmup_epochs, place, self.data
        )
        check_model(checkpoint, model, structure, place)
        within = [name for name in checkpoint.states if name.partition("-")[0] == WITHIN]
        if set(checkpoint.states) - set(within) != {"trainer", "optimizer"}:
            raise CheckpointError(
                f"{place} has states {sorted(checkpoint.states)}; start the run again with --overwrite"
            )
        saved = {name: checkpoint.states[name] for name in within}
        here = self.accelerator.process_index, self.accelerator.num_processes
        stands = shared_by(saved, *here) if within else None
        return self.folder.history(checkpoint.epoch), stands

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, within: _Within | None) -> EpochMetrics:
        """Measure what the policy needs, train an epoch or the rest of one, and evaluate."""
        sums, random = within or (EpochSums(epoch, steps=epoch * len(self.batches)), None)
        self._epoch_started = time.perf_counter() - sums.seconds
        self.trainer.set_mode(training=self.settings.mode == "train")
        if within is None:
            sums.observing_seconds = self._observe(epoch)
        seed_epoch(self.settings.seed, epoch, self.accelerator.process_index)
        start_epoch(self.batches, epoch)
        if within is None:
            self.trainer.start_epoch(epoch)
        self._train(sums, self._stepper(optimizer), random)
        training_seconds = time.perf_counter() - self._epoch_started - sums.observing_seconds
        examples, train_loss = total((sums.examples, sums.loss))
        random = random_state()
        self._guessing.labels.clear()
        with self.trainer.untouched():  # the plain model takes less than the armed one
            found = evaluate(
                self.trainer.model,
                self.evaluation,
                self.objective,
                self.accelerator,
                self.settings.mixed_precision,
                self._evaluation_parts,
                lambda: self._pause(sums, random),
            )
        if not found.loss < float("inf"):
            raise self._stopped(f"the evaluation loss became {found.loss}", sums)
        drawn = self.trainer.draw()
        process, self._warned = process_now(self.budget, self._warned)
        metrics = EpochMetrics(
            epoch=epoch,
            step=sums.steps,
            train_loss=train_loss / examples,
            accuracy=found.accuracy,
            seconds=time.perf_counter() - self._epoch_started,
            peak_bytes=sums.peak_bytes,
            channels=drawn.channels,
            selection_hash=drawn.digest,
            evaluation_loss=found.loss,
            measures=found.measures,
            saved_bytes=sums.saved_bytes,
            trainable_parameters=drawn.trainable_parameters,
            lr=sums.rate,
            samples_per_second=examples / training_seconds,
            micro_batch=self.trainer.micro_batch,
            observing_seconds=sums.observing_seconds,
            process_bytes=None if process is None else process.resident_bytes,
            process_peak_bytes=None if process is None else process.peak_bytes,
            averaged_bytes=sums.averaged_bytes,
            averaging_calls=sums.averaging_calls,
        )
        self.display.end_epoch(metrics)
        last = epoch + 1 == self.settings.epochs
        if (remark := self._guessing.remark(metrics, self.schedule.peak, self.usual_rate, last=last)) is not None:
            warnings.warn(remark, TradyWarning, stacklevel=2)
        return metrics

    def _evaluation_parts(self, batch: Any) -> Iterator[tuple[Any, torch.Tensor, float]]:
        """Cut a batch as the trainer says, and remember how many examples a pass took."""
        for part in self.trainer.parts(batch):
            self._evaluated_at_once = max(self._evaluated_at_once, len(part[1]))
            self._guessing.see(part[1])
            yield part

    def _pause(self, sums: EpochSums, random: State | None = None) -> None:
        """Save where the epoch stands if it is time, or if the run is to stop; then stop: all processes together."""
        due, stops = agree_to_stop(self._interrupts, self.accelerator, due=self._saver.due)
        if due or stops:
            sums.seconds = time.perf_counter() - self._epoch_started
            self._saver.within(sums, random)
        if stops:
            self._interrupts.check()

    def _stepper(self, optimizer: torch.optim.Optimizer) -> Stepper:
        if self.capture and self._captured is None:
            made = self.accelerator, self.trainer, self.objective.loss, self.settings.mixed_precision
            self._captured = CapturedPass(*made)
        return Stepper(
            self.accelerator,
            self.trainer,
            optimizer,
            self.objective.loss,
            self.settings.channel_clip,
            self.settings.max_grad_norm,
            self.settings.mixed_precision,
            self._captured,
        )

    def _train(self, sums: EpochSums, stepper: Stepper, random: State | None) -> None:
        """Train on every batch that is not done; measure the memory of the first step after each draw.

        Args:
            sums: Where the epoch stands; added to.
            stepper: Does a step.
            random: The random numbers that come next in an epoch that goes on in its middle.
        """
        left = len(self.batches) - sums.batches
        self.display.start_epoch(sums.epoch, self.settings.epochs, left)
        before, started = sums.examples, time.perf_counter()
        seed, process = self.settings.seed, self.accelerator.process_index
        batches = readable(read_epoch(self.batches, seed, sums.epoch, process, sums.batches))
        while (batch := self._read(batches, sums, random)) is not _NOTHING:
            if random is not None:
                set_random_state(random)
                random = None
            step, number = sums.steps, sums.batches
            sums.rate = self.schedule.rate(step)
            try:
                if number in self.redraws:
                    self.trainer.redraw()
                if not number or number in self.redraws:
                    result, ledger = self._measured(stepper, batch, sums.rate)
                    sums.take(ledger)
                else:
                    result = stepper(batch, sums.rate)
            except NotFiniteError as error:
                raise self._stopped(str(error), sums) from error
            sums.steps, sums.batches = step + 1, number + 1
            sums.examples += result.examples
            sums.loss += result.loss * result.examples
            speed = (sums.examples - before) / (time.perf_counter() - started)
            self.display.step(sums.loss / sums.examples, speed, sums.peak_bytes)
            self._pause(sums)
        if random is not None:  # it was stopped after the last batch
            set_random_state(random)
        if not sums.batches:  # examples may be another process's to count
            raise DataError("the training data gave no batch")

    def _read(self, batches: Iterator[Any], sums: EpochSums, random: State | None) -> Any:
        """Return the next batch; save the epoch if it is to stop and its readers have stopped before it."""
        try:
            return next(batches, _NOTHING)
        except Exception:
            if self._interrupts.noted and self.accelerator.num_processes == 1:  # others would wait for this one
                self._pause(sums, random)
            raise

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
            self.trainer.observe(self.observed, self.objective.loss, progress)
        return time.perf_counter() - started

    def _measured(self, stepper: Stepper, batch: Any, rate: float) -> tuple[StepResult, Ledger]:
        """Do an ordinary step, and measure it; what is replayed could not be."""
        stepper = replace(stepper, captured=None)
        results: list[StepResult] = []
        ledger = self.trainer.ledger(lambda: results.append(stepper(batch, rate)))
        (result,) = results
        return result, ledger

    def _stopped(self, what: str, sums: EpochSums) -> TrainingError:
        kept, saved = "there is no checkpoint yet", self._saver.saved_step
        if self.folder is not None and saved:
            whole = saved == sums.epoch * len(self.batches)
            of = f"epoch {sums.epoch}" if whole else f"step {saved}"
            kept = f"the checkpoint of {of} is kept in {self.folder.checkpoint}"
        return TrainingError(
            f"{what} in epoch {sums.epoch + 1}, step {sums.steps + 1}, at a learning rate of {sums.rate:.3g}; {kept}. "
            + lower_rate(self.schedule.peak)
        )

    def _finish(self, history: list[EpochMetrics]) -> Result:
        plan, ranking, delta = self.trainer.plan(), self.trainer.ranking(), self.trainer.delta()
        if (folder := self._writable()) is not None:  # tensor by tensor, from the model
            folder.write_plan(plan)
            folder.write_model(all_weights(self.trainer.model), delta)
            if self.describer is not None:
                self.describer.end(folder, plan, self._evaluated_at_once or None, len(history))
        model = self.trainer.finish()
        self._finished = True
        path = None if self.folder is None else self.folder.path
        seconds = sum(epoch.seconds for epoch in history)
        result = Result(model, self.settings.policy, self.settings.budget, tuple(history), seconds, path, ranking)
        if folder is not None:
            folder.write_result({**result.to_json(), "settings": self.settings.to_json()})
        return result

    def _writable(self) -> RunFolder | None:
        return self.folder if self.accelerator.is_main_process else None
