"""``trady finetune``: the whole run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from trady.cli import config as files
from trady.cli import options, texts
from trady.cli.choices import choice
from trady.cli.example import load_task
from trady.cli.messages import MESSAGES, Messages
from trady.cli.options import BUDGET, FOLDER, TRAINING, TRAINS

if TYPE_CHECKING:
    from trady.training.data.datasets import DataSplit

EXAMPLES = """Example: trady finetune efficientnet-lite0 photos/ --image-size 64 --budget '60 MiB' --out runs/photos

Or: trady finetune sentence-transformers/all-MiniLM-L6-v2 reviews.csv --out runs/reviews

Or: trady finetune --config runs/photos/run.toml --set lr=0.05 --out runs/again
"""

Mode = Literal["train", "eval"]

Precision = Literal["no", "bf16"]

AugmentName = Literal["none", "light", "paper"]


def finetune(
    context: typer.Context,
    model: options.Model,
    dataset: options.Dataset,
    budget: Annotated[
        str,
        typer.Option(
            help='What may be taken: "300 MiB" (by a step), "process:400 MiB" (by all in memory), "update:1 MiB", '
            '"elements:27946" or "80%" (of what is free). auto: what an inference pass takes. Not for --policy full.',
            rich_help_panel=BUDGET,
        ),
    ] = "auto",
    out: Annotated[str, typer.Option(help="The run folder.", rich_help_panel=FOLDER)] = "runs/finetune",
    epochs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Passes over the training data. With --resume, more are added to a finished run.",
            rich_help_panel=TRAINING,
        ),
    ] = 5,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Examples a step; 32, or 8 sequences of a language model, by default.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate at the end of the warm-up; one that suits optimizer and data by default.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    image_size: options.ImageSize = None,
    limit: options.Limit = None,
    micro_batch: options.MicroBatch = None,
    policy: options.Policy = "trady",
    scheme: options.Scheme = None,
    train: options.Train = None,
    freeze: options.Freeze = None,
    over_budget: options.OverBudget = "adapt",
    max_step_flops: options.MaxStepFlops = None,
    recompute: options.Recompute = "auto",
    fidelity: options.Fidelity = "exact",
    ranking: options.RankingFile = None,
    observed_batches: Annotated[
        int,
        typer.Option(
            min=1, help="Batches that a policy which measures before it draws is measured on.", rich_help_panel=TRAINS
        ),
    ] = 4,
    draws_per_epoch: Annotated[
        int,
        typer.Option(
            min=1, help="Channels are drawn this often in an epoch; more where epochs are few.", rich_help_panel=TRAINS
        ),
    ] = 1,
    augment: Annotated[
        str,
        choice(
            possible=options.AUGMENTATIONS,
            panel=options.DATA,
            text="Vary training images: none, light (crops, mirror images) or paper (colours as well).",
        ),
    ] = "none",
    optimizer: Annotated[
        str | None,
        choice(
            possible=options.OPTIMIZERS,
            panel=TRAINING,
            text="sgd (on images by default), adam or adamw (on texts); sgd-in-backward or adamw-in-backward update "
            "each layer at once.",
        ),
    ] = None,
    momentum: Annotated[float, typer.Option(help="For sgd.", rich_help_panel=TRAINING)] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="For every optimizer.", rich_help_panel=TRAINING)] = 0.0,
    warmup_epochs: Annotated[
        float | None,
        typer.Option(help="Length of the warm-up; a tenth of the run by default.", rich_help_panel=TRAINING),
    ] = None,
    channel_clip: Annotated[
        str,
        typer.Option(
            help="A channel's gradient is scaled down to this share of the channel's norm. auto: 0.1, and less where "
            "more than a quarter of the weights trains.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    max_grad_norm: Annotated[
        float, typer.Option(help="The head's gradient is scaled down to this norm.", rich_help_panel=TRAINING)
    ] = 2.0,
    mode: Annotated[
        str, choice(possible=("train", "eval"), panel=TRAINING, text="Dropout in training: on (train) or off (eval).")
    ] = "train",
    mixed_precision: Annotated[
        str, choice(possible=("no", "bf16"), panel=TRAINING, text="Forward passes in bfloat16: no or bf16.")
    ] = "no",
    on_unreadable: options.OnUnreadable = "refuse",
    text_column: texts.TextColumn = None,
    label_column: texts.LabelColumn = None,
    evaluation: texts.EvaluationFile = None,
    task_name: texts.TaskName = None,
    max_length: texts.MaxLength = None,
    overflow: texts.OverflowOption = "truncate",
    seed: options.Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=FOLDER)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is there.", rich_help_panel=FOLDER)
    ] = False,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(
            help='Write a checkpoint inside epochs as well, this often: "10min", "90s", "1h".', rich_help_panel=FOLDER
        ),
    ] = None,
    keep_best: Annotated[
        bool,
        typer.Option(
            "--keep-best/--no-keep-best",
            help="Keep the weights of the best epoch: best.safetensors.",
            rich_help_panel=FOLDER,
        ),
    ] = True,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="End the run after n epochs without a higher accuracy.", rich_help_panel=TRAINING),
    ] = None,
    capture: Annotated[
        bool,
        typer.Option("--capture", help="On CUDA: record a step once a draw, and replay it.", rich_help_panel=TRAINING),
    ] = False,
    config: files.Config = None,
    setting: files.Setting = None,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model on images or texts, inside a memory budget."""
    from trady.records.lock import refuse_locked
    from trady.report.units import format_bytes
    from trady.training.data.load import check_examples
    from trady.training.durations import parse_seconds
    from trady.training.provenance import Origin
    from trady.training.run import run
    from trady.training.run_folder import RunFolder
    from trady.training.run_options import RunOptions
    from trady.training.texts.tables import is_texts

    # Everything that can be refused at once is, before minutes go into reading the data.
    given = context.get_parameter_source("budget")
    typed = getattr(given, "name", "") != "DEFAULT"
    request = options.read_request(
        budget=budget if typed or policy not in ("full", "head") else None,
        policy=policy,
        scheme=scheme,
        ranking=ranking,
        seed=seed,
        recompute=recompute,
        fidelity=fidelity,
        micro_batch=micro_batch,
        train=train,
        freeze=freeze,
        over_budget=over_budget,
        max_step_flops=max_step_flops,
    )
    limit_of_channels = options.read_limit(channel_clip, "--channel-clip")
    if checkpoint_every is not None:
        parse_seconds(checkpoint_every, "--checkpoint-every")
    folder = RunFolder(Path(out))
    first = os.environ.get("RANK", "0") == "0"  # of several processes of one run: it takes the folder, and speaks
    if first:
        refuse_locked(folder.path)
    resuming = folder.check(resume=resume, overwrite=overwrite)
    if resuming and budget.strip().endswith("%"):  # of what was free when the run began
        request = options.with_budget_of(request, folder)
    messages: Messages = context.meta[MESSAGES]
    messages.quiet = quiet or not first
    if log_file is not None and first:
        messages.open_log(log_file)
    of_texts = texts.TextOptions(text_column, label_column, evaluation, task_name, max_length, overflow)
    if are_texts := is_texts(dataset):
        texts.refuse_for_texts(dataset, {"--image-size": image_size, "--augment": augment != "none"})
        task = of_texts.load(model, dataset, limit, seed, say=messages.say)
    else:
        of_texts.refuse_for_images(dataset)
        task = load_task(model, dataset, image_size, limit, on_unreadable, seed, messages=messages, keep=folder.decoded)
        check_examples(cast("DataSplit", task.data), dataset)
    if batch_size is None:
        batch_size = texts.usual_batch_size(task) if are_texts else texts.BATCH_SIZE
    try:
        result = run(
            task.model,
            task.data.train,
            task.data.evaluation,
            request,
            RunOptions(
                epochs=epochs,
                out=out,
                batch_size=batch_size,
                lr=lr,
                warmup_epochs=warmup_epochs,
                channel_clip=limit_of_channels,
                max_grad_norm=max_grad_norm,
                resume=resume,
                overwrite=overwrite,
                optimizer=optimizer,
                momentum=momentum,
                weight_decay=weight_decay,
                mode=cast(Mode, mode),
                mixed_precision=cast(Precision, mixed_precision),
                observed_batches=observed_batches,
                draws_per_epoch=draws_per_epoch,
                augment=cast(AugmentName, augment),
                checkpoint_every=checkpoint_every,
                keep_best=keep_best,
                patience=patience,
                capture=capture,
                progress=not quiet,
                log=messages.log_console,
                say=messages.say,
                origin=Origin(model, dataset, context.meta.get(options.COMMAND_LINE), files.as_toml(context)),
            ),
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or folder.where_it_stands()) from None
    if not first:
        return
    taken = f"peak of a step {format_bytes(result.peak_bytes)}"
    if result.process_peak_bytes is not None:
        taken += f", of the process {format_bytes(result.process_peak_bytes)}"
    ending = f"{result.history[-1]}; {taken}; weights, metrics and plan are in {out}"
    messages.record(ending)
    if as_json:
        skipped = [] if are_texts else list(cast("DataSplit", task.data).skipped)
        options.print_json({**result.to_json(), "out": out, "skipped": skipped})
    else:
        typer.echo(ending)
        if not quiet:
            typer.echo(f"try it: trady predict {shlex.quote(out)} {'TEXT' if are_texts else 'IMAGE'} …")
            typer.echo(f"all of it on a page: trady report {shlex.quote(out)}")
