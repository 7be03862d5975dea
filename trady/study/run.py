"""The runs of a study: every data set with every seed, each epoch recorded; finished runs are not repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import Dataset

from trady.analysis.model_analysis import analyse_model, trace_modes
from trady.channels.table import ChannelTable
from trady.errors import DataError, ModelError, TrainingError
from trady.planning.budget import parse_budget
from trady.planning.request import Request
from trady.policies import get_policy, needs_of
from trady.records.translated import file_errors
from trady.study.folder import StudyFolder, Unit
from trady.study.gradients import GradientSource, PlainGradients, SweptGradients
from trady.study.parquet import write_noise, write_norms
from trady.study.recorder import EpochRecord, Recorder
from trady.study.settings import StudySettings
from trady.training.batch import cross_entropy, split_batch
from trady.training.data.datasets import epoch_seed
from trady.training.data.identity import identity
from trady.training.data.loaders import Batches, evaluation_batches, on_device, training_batches
from trady.training.data.observed_batches import measured_on
from trady.training.loop import Loop
from trady.training.objective import TopOne
from trady.training.optimizers import optimizer_factory
from trady.training.progress import Display, Lines, Silent
from trady.training.randomness import own_randomness, seed_epoch
from trady.training.run_folder import RunFolder
from trady.training.schedule import make_schedule
from trady.training.settings import OBSERVED_BATCHES, Settings
from trady.training.trainer import FullTrainer, Trainer, TunerTrainer
from trady.tuner.tuner import Tuner


@dataclass(frozen=True)
class StudyTask:
    """A data set of a study.

    Attributes:
        name: Short, as in figures; unlike those of the others.
        train: Images to train on.
        evaluation: Images to measure accuracy on.
        model: Makes the pretrained model, with a head for this data set drawn with the seed.
    """

    name: str
    train: Dataset[Any]
    evaluation: Dataset[Any]
    model: Callable[[int], nn.Module]


@file_errors()
def record(
    folder: StudyFolder,
    settings: StudySettings,
    tasks: Sequence[Callable[[], StudyTask]],
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Run all runs that are not finished yet.

    Args:
        folder: Where records go; runs that are finished there are not run again, one that was stopped goes on.
        settings: The same for all runs.
        tasks: One a data set; called only if a run on it is missing.
        names: Their names, in the same order.
        seeds: Of the runs on each.
        progress: Show a line an epoch on standard error.
        say: Told of layers without a gradient.

    Raises:
        StateError: The folder holds a study with other settings.
        ModelError: No layer ever sees a gradient.
        BudgetError: A layer has no channel that fits in the budget.
        DataError: There are too few images for the batches of noise.
    """
    folder.begin(settings)
    for name in names:
        for seed in seeds:
            if _finished(folder, name, seed):  # perhaps killed before its weights were dropped
                RunFolder(folder.run(name, seed)).drop_weights()
    todo = {name: [seed for seed in seeds if not _finished(folder, name, seed)] for name in names}
    total, done = sum(map(len, todo.values())), 0
    for name, make in zip(names, tasks, strict=True):
        task = make() if todo[name] else None
        for seed in todo[name]:
            assert task is not None
            done += 1
            title = f"[{done}/{total}] {name}, seed {seed}:"
            _run(folder, settings, task, seed, Lines(title, None) if progress else Silent(), say)


def _finished(folder: StudyFolder, dataset: str, seed: int) -> bool:
    return RunFolder(folder.run(dataset, seed)).result.exists()


def _run(
    folder: StudyFolder,
    study: StudySettings,
    task: StudyTask,
    seed: int,
    display: Display,
    say: Callable[[str], None],
) -> None:
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise TrainingError("a study runs in one process; start it without accelerate launch or torchrun")
    loader = training_batches(task.train, study.batch_size, seed)
    if len(loader) < study.noise_batches:
        raise DataError(
            f"{task.name} gives {len(loader)} batches of {study.batch_size}, and the noise is measured on "
            f"{study.noise_batches}: lower --noise-batches or --batch-size, or raise --limit"
        )
    schedule = make_schedule(study.lr, study.epochs, len(loader), None)
    run_folder = RunFolder(folder.run(task.name, seed))
    run_folder.path.mkdir(parents=True, exist_ok=True)
    run_folder.check(resume=True, overwrite=False)
    seen: set[str] = set()

    def write(record: EpochRecord) -> None:
        unit = Unit(task.name, seed, record.epoch)
        seen.update(name for name, steps in record.norms.items() if any(norms.any() for norms in steps))
        if not seen:
            raise ModelError("no layer ever saw a gradient; is the model's output detached from its weights?")
        if record.epoch == 0 and (unseen := [layer.name for layer in table if layer.name not in seen]):
            say(f"without a gradient in the first epoch on {task.name}: {', '.join(unseen)}")
        write_norms(folder.norms(unit), unit, record)
        write_noise(folder.noise(unit), unit, record.noise)

    with own_randomness():
        seed_epoch(seed, -1)
        model = task.model(seed).to(accelerator.device)
        example, _ = split_batch(send_to_device(next(iter(loader)), accelerator.device))
        table = analyse_model(model, example, traces=trace_modes(model, example, evaluation=False)).table
        folder.keep_table(table)
        trainer, source = _armed(model, table, study, seed, example)
        recorder = Recorder(
            table=table,
            source=source,
            batches=on_device(loader, accelerator),
            noise_batches=training_batches(task.train, study.batch_size, epoch_seed(seed, 0, "noise order")),
            noise_count=study.noise_batches,
            device=accelerator.device,
            every=study.every,
            seed=seed,
            display=display,
            write=write,
        )
        loop = Loop(
            trainer=trainer,
            batches=cast(Batches, recorder),
            evaluation=on_device(evaluation_batches(task.evaluation, study.batch_size), accelerator),
            accelerator=accelerator,
            schedule=schedule,
            settings=_settings(study, schedule.steps, schedule.warmup_steps, seed),
            display=recorder,
            objective=TopOne(),
            factory=optimizer_factory("sgd", study.lr, 0.0, 0.0),
            folder=run_folder,
            observed=measured_on(loader, OBSERVED_BATCHES, seed, accelerator.device),
            data=identity(task.train, task.evaluation),
        )
        try:
            loop.run(resume=True)
        finally:
            loop.display.close()
            loop.disarm()
    run_folder.drop_weights()  # a study has many runs, and does not need their weights


def _armed(
    model: nn.Module, table: ChannelTable, study: StudySettings, seed: int, example: Any
) -> tuple[Trainer, GradientSource]:
    if study.budget is None:
        return FullTrainer(model), PlainGradients(model, table, cross_entropy)
    request = Request(budget=parse_budget(study.budget), policy=study.policy, seed=seed)
    tuner = Tuner(request.decide(model, example))
    return TunerTrainer(tuner), SweptGradients(tuner.sweeper(cross_entropy))


def _measures(study: StudySettings) -> bool:
    return study.budget is not None and bool(needs_of(get_policy(study.policy)))


def _settings(study: StudySettings, steps: int, warmup_steps: int, seed: int) -> Settings:
    return Settings(
        policy="full" if study.budget is None else study.policy,
        budget=study.budget,
        ranking="",
        epochs=study.epochs,
        steps=steps,
        batch_size=study.batch_size,
        lr=study.lr,
        warmup_steps=warmup_steps,
        channel_clip="auto",
        max_grad_norm=2.0,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        mode="train",
        mixed_precision="no",
        seed=seed,
        observed_batches=OBSERVED_BATCHES if _measures(study) else None,
    )
