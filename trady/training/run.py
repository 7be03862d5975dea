"""``trady.finetune``: a complete run in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trady.analysis.by_hand import Wish, as_text
from trady.errors import TrainingError
from trady.planning.budget import Budget
from trady.planning.request import AUTO, Request
from trady.policies import Policy, get_policy, needs_of
from trady.process.ranks import agree, leaving_a_reason
from trady.ranking.priors import Known
from trady.ranking.ranking import LayerRanking
from trady.records.lock import refuse_locked
from trady.records.translated import file_errors
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.training.arming import FULL, check_statistics, make_trainer
from trady.training.batch import Loss
from trady.training.data.augment import AugmentName, augmented
from trady.training.data.identity import identity
from trady.training.data.loaders import evaluation_batches, on_device, training_batches
from trady.training.data.looking import to_be_looked_at
from trady.training.data.observed_batches import measured_on
from trady.training.durations import parse_seconds
from trady.training.loop import Loop
from trady.training.objective import objective_of
from trady.training.optimizers import OptimizerFactory, memory_of, optimizer_factory
from trady.training.own_budget import told, with_amount
from trady.training.precision import Precision, compute_dtype
from trady.training.process import in_process
from trady.training.progress import Display, display_of
from trady.training.provenance import describe
from trady.training.randomness import own_randomness, seed_epoch
from trady.training.rates import kind_of, usual_optimizer, usual_rate
from trady.training.result import Result
from trady.training.run_folder import RunFolder
from trady.training.run_options import RunOptions
from trady.training.saver import Saving
from trady.training.schedule import make_schedule, redraw_steps
from trady.training.settings import (
    OBSERVED_BATCHES,
    Settings,
    ranking_digest,
    refuse_capture,
    refuse_limit_of_full,
)
from trady.training.sharing import share_of_step
from trady.training.trainer import TunerTrainer

#: The policy that needs no budget: only the head trains.
HEAD = "head"


def finetune(
    model: nn.Module,
    train: Dataset[Any] | DataLoader[Any],
    evaluation: Dataset[Any] | DataLoader[Any],
    *,
    budget: str | int | Budget | None = None,
    epochs: int,
    out: str | Path | None,
    batch_size: int = 32,
    lr: float | None = None,
    policy: str | Policy = "trady",
    ranking: LayerRanking | Known | None = None,
    head: str | Sequence[str] | None = "auto",
    seed: int = 0,
    warmup_epochs: float | None = None,
    channel_clip: float | Literal["auto"] | None = "auto",
    max_grad_norm: float | None = 2.0,
    resume: bool = False,
    overwrite: bool = False,
    optimizer: str | OptimizerFactory | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss: Loss | None = None,
    mode: Literal["train", "eval"] = "train",
    mixed_precision: Precision = "no",
    recompute: Literal["auto", "all", "none"] = "auto",
    fidelity: str = "exact",
    micro_batch: int | Literal["auto", "most"] | None = None,
    train_layers: Wish | None = None,
    freeze: Wish | None = None,
    over_budget: str = "adapt",
    max_step_flops: str | float | None = None,
    observed_batches: int = OBSERVED_BATCHES,
    draws_per_epoch: int = 1,
    augment: AugmentName = "none",
    checkpoint_every: str | float | None = None,
    keep_best: bool = True,
    patience: int | None = None,
    capture: bool = False,
    progress: bool | Display = True,
) -> Result:
    """Fine-tune a model inside a memory budget, from the first step to the result.

    The method is TraDy (arXiv 2510.19675): each epoch trains newly drawn input channels of the
    top-K layers. The rate warms up over a tenth of the steps and falls along a cosine to zero.

    Args:
        model: Trained in place, and returned in the result.
        train: A map-style dataset of (inputs, label), or a ``DataLoader`` of (inputs, labels) or
            of dicts with ``labels``.
        evaluation: The same, to measure accuracy on after each epoch.
        budget: What a training step may take, e.g. ``"300 MiB"``, or the process as a whole, ``"process:400 MiB"``
            (docs/budgets.md), which moves images of :func:`trady.load_data` to a file; ``"auto"``, the default, is what
            an inference pass takes. ``policy="full"`` takes none, ``head`` needs none.
        epochs: Number of passes over the training data.
        out: The run folder: plan, metrics, checkpoint, weights. ``None`` writes nothing.
        batch_size: Examples a step, also of the evaluation.
        lr: Learning rate at the end of the warm-up; by default one that suits the optimizer (docs/optimizers.md),
            or the rate that an optimizer of your own was made with.
        policy: Where to update. ``full`` is plain PyTorch fine-tuning of everything, for comparison.
        ranking: A layer ranking, ``"online"`` or ``"structural"`` (:func:`trady.prepare`); without one it is the prior
            of this structure, or found online.
        head: Modules that always train, outside the budget; ``auto`` finds the classifier.
        seed: Decides the channels, the order of the data and all other random numbers.
        warmup_epochs: Length of the warm-up; a tenth of the run by default.
        channel_clip: The gradient of a channel is scaled down to this share of the channel's own norm
            (arXiv 2102.06171); ``auto`` is 0.1, less where over a quarter of the weights trains (docs/optimizers.md).
        max_grad_norm: The gradient of the head (with ``policy="full"``: of everything) is scaled down to
            this norm; ``None`` does not clip.
        resume: Go on from the run folder's checkpoint; bit for bit on a CPU. Without one, start. With more
            ``epochs`` than a finished run has, these are added: the rate warms up and falls once more.
        overwrite: Replace a run that is in the folder already.
        optimizer: ``sgd`` (the default on images), ``adam``, ``adamw`` (on texts), or a function from parameters to an
            optimizer.
        momentum: For ``sgd``.
        weight_decay: For named optimizers.
        loss: From (the model's output, labels) to the mean over the samples; cross entropy by default.
        mode: ``train`` has dropout on in training, ``eval`` has it off. Evaluation always has it off.
        mixed_precision: ``bf16`` runs forward passes under autocast.
        recompute: What is recomputed in the backward pass instead of kept (:func:`trady.prepare`).
        fidelity: How exactly smooth activations that are kept are differentiated: ``exact``, ``8bit`` or ``4bit``
            (docs/fidelity.md).
        micro_batch: A step's batch is cut into chunks of up to this many samples, with a forward and backward pass
            each. The update uses the mean gradient, so the result is that of the full batch, except for dropout's
            random numbers and the order of sums. ``auto`` is the largest chunk that the budget is possible with:
            the full batch, half, a quarter, …; ``most`` is the largest one with which nearly as many weights (95 %)
            train as with any, which is slower and leaves more of a peak to channels.
        train_layers: Layers that channels are drawn from, ``train=`` of :func:`trady.prepare`.
        freeze: Layers that stay as they are (:func:`trady.prepare`); flags ``requires_grad=False`` are obeyed too.
        over_budget: What happens where a batch would break a budget in bytes and not even one sample of it fits:
            ``"adapt"`` (fewer channels train from then on), ``"refuse"`` or ``"warn"`` (:func:`trady.prepare`). Before
            that, it is cut into parts that fit, with the same update (docs/budgets.md).
        max_step_flops: What a step may take of the operations of full fine-tuning, e.g. ``"0.6x"``
            (:func:`trady.prepare`).
        observed_batches: Number of batches that policies are measured on if they measure before they draw
            (docs/policies.md): the first of a seeded order of the training data, the same in every epoch and on
            every rank.
        draws_per_epoch: How often channels are drawn in an epoch, at equal distances. The paper draws once; take more
            where epochs are few and long.
        augment: How training images that :func:`trady.load_data` has read are varied, anew in each epoch: ``light``
            crops and mirrors them, ``paper`` does so more strongly and changes their colours too, as the paper's
            authors do; ``none`` takes them as they are.
        checkpoint_every: Write a checkpoint also inside epochs, this often: seconds, or a text such as ``"10min"``,
            ``"90 s"`` or ``"1h"``.
        keep_best: Keep the weights of the epoch of the highest accuracy, in ``best.safetensors``.
        patience: End the run after this many epochs without a higher accuracy; ``None`` trains all.
        capture: On CUDA, record the forward and backward pass once a draw and replay it (docs/capture.md).
        progress: Show progress on standard error, or a display of your own.

    Returns:
        The trained model with its measured history.

    Raises:
        BudgetError: The budget cannot be read or is below the minimum.
        DataError: The data is empty, or a label is out of range.
        StateError: ``out`` holds a run and neither ``resume`` nor ``overwrite`` is given.
        LockedError: Another process works in ``out``.
        CheckpointError: The checkpoint is damaged, or of other data, or of another model, version or setting.
        ModelError: ``micro_batch`` with a normalisation over the batch's own statistics.
        ResourceError: Disk or memory ran out; the last checkpoint is kept.
        FileError: The run folder cannot be written.
        TrainingError: A setting is out of range, or the loss is no longer finite; the last good checkpoint is kept.
        Stopped: SIGTERM or SIGHUP came while it trained: a ``SystemExit``, raised once the run is saved.
    """
    request = Request(
        budget=None if get_policy(policy).name == FULL else budget,
        policy=policy,
        ranking=ranking,
        head=head,
        seed=seed,
        recompute=recompute,
        fidelity=fidelity,
        micro_batch=micro_batch,
        train=train_layers,
        freeze=freeze,
        autocast=compute_dtype(mixed_precision),
        over_budget=over_budget,
        max_step_flops=max_step_flops,
    )
    return run(
        model,
        train,
        evaluation,
        request,
        RunOptions(
            epochs=epochs,
            out=out,
            batch_size=batch_size,
            lr=lr,
            warmup_epochs=warmup_epochs,
            channel_clip=channel_clip,
            max_grad_norm=max_grad_norm,
            resume=resume,
            overwrite=overwrite,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            loss=loss,
            mode=mode,
            mixed_precision=mixed_precision,
            observed_batches=observed_batches,
            draws_per_epoch=draws_per_epoch,
            augment=augment,
            checkpoint_every=checkpoint_every,
            keep_best=keep_best,
            patience=patience,
            capture=capture,
            progress=progress,
        ),
    )


def run(
    model: nn.Module,
    train: Dataset[Any] | DataLoader[Any],
    evaluation: Dataset[Any] | DataLoader[Any],
    request: Request,
    options: RunOptions,
) -> Result:
    """Do what :func:`finetune` does, with what is asked of the budget in one value, and the rest in another."""
    if options.epochs < 1:
        raise TrainingError(f"epochs is {options.epochs}; it must be at least 1")
    policy, seed = get_policy(request.policy), request.seed
    kind = kind_of(train)
    optimizer = usual_optimizer(kind) if options.optimizer is None else options.optimizer
    usual = usual_rate(optimizer, options.momentum, policy=policy.name, kind=kind)
    lr = usual if options.lr is None else options.lr
    if policy.name == FULL:
        refuse_limit_of_full(request.step_limit)
        request = replace(request, budget=None)
    elif request.budget is None and policy.name != HEAD:
        request = replace(request, budget=AUTO)
    # Where there is no accelerator it has to be told so, or each process of torchrun takes itself for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if options.capture:
        refuse_capture(policy.name, accelerator.device)
    folder = None if options.out is None else RunFolder(Path(options.out))
    with file_errors():
        if folder is not None and accelerator.is_main_process:
            refuse_locked(folder.path)
        resuming = folder is not None and folder.check(resume=options.resume, overwrite=options.overwrite)
    request = in_process(
        request,
        (train, evaluation),
        None if folder is None else folder.path,
        resumed=folder.plan if folder is not None and resuming else None,
        processes=accelerator.num_processes,
    )
    own_loader = isinstance(train, DataLoader)
    share = share_of_step(
        folder.checkpoint if folder is not None and resuming else None,
        train.batch_size if isinstance(train, DataLoader) else options.batch_size,
        accelerator.num_processes,
        fixed=own_loader,
        speaks=accelerator.is_main_process,
    )
    data = augmented(train, options.augment, seed)
    if moved := not own_loader and share.batch_size != share.started_batch_size:
        options = replace(options, batch_size=share.batch_size or options.batch_size)
    loader = training_batches(data, options.batch_size, seed)
    if accelerator.num_processes == 1:
        loader = to_be_looked_at(loader)
    # The example that is planned for and the batches that are measured stay what they were, and so do the draws.
    planned = training_batches(data, share.started_batch_size or 1, seed) if moved else loader
    batches = on_device(loader, accelerator)
    ahead = accelerator.num_processes > 1 and accelerator.device.type == "cpu"
    waiting = options.observed_batches - 1 if needs_of(policy) and isinstance(loader.dataset, IterableDataset) else 0
    request = replace(request, batches_ahead=int(ahead) + waiting)
    schedule = make_schedule(lr, options.epochs, len(batches), options.warmup_epochs)
    factory = optimizer_factory(optimizer, lr, options.momentum, options.weight_decay)
    # A user's own factory is not called on a trial parameter, which it might keep: its optimizer is examined when
    # it is attached.
    memory = memory_of(factory, accelerator.device) if isinstance(optimizer, str) else OptimizerMemory()
    automatic = request.budget == AUTO
    request = with_amount(
        request,
        model.to(accelerator.device),
        loader,
        accelerator.device,
        memory,
        resumed=folder.plan if folder is not None and resuming else None,
    )
    settings = Settings(
        policy=policy.name,
        budget=None if request.limit is None else str(request.limit),
        ranking=ranking_digest(request.ranking),
        epochs=options.epochs,
        steps=schedule.steps,
        batch_size=share.started_batch_size,
        lr=schedule.peak_rate,
        warmup_steps=schedule.warmup_steps,
        channel_clip=options.channel_clip,
        max_grad_norm=options.max_grad_norm,
        optimizer=optimizer if isinstance(optimizer, str) else "custom",
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        mode=options.mode,
        mixed_precision=options.mixed_precision,
        seed=seed,
        recompute=request.recompute,
        fidelity=request.fidelity,
        micro_batch=request.micro_batch,
        observed_batches=options.observed_batches if needs_of(policy) else None,
        draws_per_epoch=options.draws_per_epoch,
        augment=None if options.augment == "none" else options.augment,
        train_layers=as_text(request.train),
        freeze=as_text(request.freeze),
        over_budget=None if request.over_budget == "adapt" else request.over_budget,
        max_step_flops=request.step_limit,
        patience=options.patience,
        processes=share.started_processes if share.started_processes > 1 else None,
    )
    if request.micro_batch is None and share.can_be_cut(optimizer, model):
        request = replace(request, micro_batch=share.passes_of)
    if accelerator.num_processes > 1:
        agree({name: str(value) for name, value in settings.to_json().items()})
    redraws = redraw_steps(options.draws_per_epoch, len(batches))
    if request.micro_batch is not None:
        check_statistics(model)
    every = None if options.checkpoint_every is None else parse_seconds(options.checkpoint_every, "checkpoint_every")
    with leaving_a_reason(), file_errors(), own_randomness():
        seed_epoch(seed, -1)
        model.to(accelerator.device)
        facts = None if folder is None else identity(train, evaluation)
        objective = objective_of(evaluation, options.loss)
        loop = Loop(
            trainer=make_trainer(model, planned, accelerator, request, memory, options.loss),
            batches=batches,
            evaluation=on_device(evaluation_batches(evaluation, options.batch_size), accelerator),
            observed=measured_on(planned, options.observed_batches, seed, accelerator.device),
            accelerator=accelerator,
            schedule=schedule,
            redraws=redraws,
            settings=settings,
            display=display_of(
                options.progress, settings.policy, request.limit, shown=accelerator.is_main_process, log=options.log
            ),
            objective=objective,
            factory=factory,
            folder=folder,
            budget=request.limit,
            saving=Saving(every, best=options.keep_best),
            data=facts,
            describer=None
            if facts is None
            else describe(model, train, settings, options.origin, accelerator.device, facts),
            capture=options.capture,
            warmup_epochs=options.warmup_epochs,
            usual_rate=usual if options.loss is None else None,
        )
        if isinstance(loop.trainer, TunerTrainer):
            options.say(told(loop.trainer.tuner.plan, automatic=automatic))
        try:
            return loop.run(resume=options.resume, overwrite=options.overwrite)
        finally:
            loop.display.close()
            loop.disarm()
