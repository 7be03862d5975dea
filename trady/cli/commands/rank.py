"""``trady rank``: which layers carry the gradient on a task."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from trady.cli import options
from trady.cli.choices import choice
from trady.cli.example import load_task
from trady.cli.texts import TextOptions


def rank(
    model: options.Model,
    dataset: options.Dataset,
    out: Annotated[str, typer.Option(help="Where the ranking is written.")] = "ranking.json",
    batches: Annotated[int, typer.Option(min=1, help="Number of batches to measure on.")] = 8,
    batch_size: options.BatchSize = 32,
    budget: Annotated[
        str | None, typer.Option(help="What ranking itself may take, e.g. 300 MiB; no limit by default.")
    ] = None,
    as_prior: Annotated[
        bool,
        typer.Option(
            "--as-prior/--no-prior",
            help="Keep an rgn ranking for later runs: models of this structure are then trained by it without "
            "--ranking.",
        ),
    ] = False,
    metric: Annotated[
        str, choice(possible=("rgn", "norm"), panel=options.TRAINS, text="rgn (gradient for its cost) or norm.")
    ] = "rgn",
    norm: Annotated[
        str,
        choice(
            possible=("frozen", "batch"),
            panel=options.TRAINS,
            text="Batch normalisation while measuring: frozen (as trady trains) or batch (its statistics).",
        ),
    ] = "frozen",
    image_size: options.ImageSize = None,
    on_unreadable: options.OnUnreadable = "refuse",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Measure how much each layer matters on a data set."""
    import trady
    from trady.errors import RankingError
    from trady.ranking.priors import save_prior
    from trady.ranking.scores import Metric
    from trady.training.batch import split_batch
    from trady.training.objective import objective_of
    from trady.training.texts.tables import is_texts

    if as_prior and metric != "rgn":
        raise RankingError(f"--as-prior keeps a ranking by rgn, which layers are drawn by, and --metric is {metric}")
    if is_texts(dataset):
        task = TextOptions().load(model, dataset, batches * batch_size, seed)
    else:
        task = load_task(model, dataset, image_size, batches * batch_size, on_unreadable, seed, split="train")
    train = task.data.train
    starts = range(0, min(len(train), batches * batch_size), batch_size)
    ranking = trady.rank(
        task.model.train(),
        [split_batch(train.batch(range(start, min(start + batch_size, len(train))))) for start in starts],
        objective_of(train, None).loss,
        metric=cast(Metric, metric),
        budget=budget,
        norm=cast(Literal["frozen", "batch"], norm),
    )
    ranking = replace(ranking, measured_on=f"{Path(dataset).name}, {ranking.batches} batches of {batch_size}")
    ranking.save(out)
    kept = save_prior(ranking) if as_prior else None
    if as_json:
        options.print_json(ranking.to_json())
        return
    top = ranking.top()
    for place, name in enumerate(ranking.order, start=1):
        typer.echo(f"{place:4} {name:48} {ranking.scores[name]:.3e}{'  pool' if name in top else ''}")
    typer.echo(f"{len(top)} of {len(ranking.scores)} layers hold 97 %; written to {out}")
    if kept is not None:
        typer.echo(f"kept as the prior of this structure, for later runs: {kept}")
    elif metric == "rgn":
        typer.echo(f"train by it with --ranking {shlex.quote(out)}; --as-prior keeps it for all later runs")
