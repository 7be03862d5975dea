"""``trady study``: the observations behind the method, on a model and data sets of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trady.cli import options
from trady.cli.example import load_task

if TYPE_CHECKING:
    from trady.study.run import StudyTask


def study(
    model: Annotated[
        str | None,
        typer.Argument(help="efficientnet-lite0; a folder or a Hub name (transformers); or package.module:function."),
    ] = None,
    datasets: Annotated[
        list[str] | None, typer.Argument(help="One or several: fashion-mnist; a .npz file; or a folder of images.")
    ] = None,
    out: Annotated[str, typer.Option(help="The study's folder; what is finished there is not run again.")] = (
        "runs/study"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs on each data set.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 3,
    batch_size: options.BatchSize = 32,
    lr: Annotated[float, typer.Option(help="Learning rate at the end of the warm-up.")] = 0.05,
    image_size: options.ImageSize = None,
    limit: options.Limit = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Train inside a budget, and see all channels in sweeps that fit; all weights by default."),
    ] = None,
    policy: options.Policy = "trady",
    every: Annotated[
        int | None, typer.Option(min=1, help="One step in n is recorded; 1 by default, 8 inside a budget.")
    ] = None,
    noise_batches: Annotated[
        int, typer.Option(min=2, help="Batches at the beginning of each epoch that the noise is taken from.")
    ] = 8,
    simulate: Annotated[
        list[str] | None,
        typer.Option(help='Budget in which online ranking is simulated, e.g. "elements:27946"; may be repeated.'),
    ] = None,
    figures_only: Annotated[
        str | None, typer.Option(help="Train nothing: draw figures and page again from the records in this folder.")
    ] = None,
    on_unreadable: options.OnUnreadable = "refuse",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Record gradients while a model trains, and show what they are like: a page, figures, statistics."""
    from trady.errors import DataError, ModelError
    from trady.study.extra import check_installed

    check_installed()
    from trady.study.folder import StudyFolder
    from trady.study.online import elements_of
    from trady.study.records import read_records
    from trady.study.report import write_report
    from trady.study.run import record
    from trady.study.settings import StudySettings
    from trady.study.statistics import statistics

    for text in simulate or ():
        elements_of(text)
    if figures_only is not None:
        if model is not None:
            raise ModelError("--figures-only trains nothing: type the study's folder and no model")
        folder = StudyFolder(Path(figures_only))
    else:
        if model is None:
            raise ModelError("no model is given; type e.g. trady study efficientnet-lite0 fashion-mnist")
        if not datasets:
            raise DataError(f"no data set is given; type e.g. trady study {model} fashion-mnist")
        if budget is not None:
            _check_budget(budget, policy)
        names = short_names(datasets)
        folder = StudyFolder(Path(out))
        settings = StudySettings(
            model=model,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            image_size=image_size,
            limit=limit,
            budget=budget,
            policy=policy,
            every=every or (1 if budget is None else 8),
            noise_batches=noise_batches,
        )
        tasks = [
            partial(_task, model, dataset, name, image_size, limit, on_unreadable, seed)
            for dataset, name in zip(datasets, names, strict=True)
        ]
        try:
            record(folder, settings, tasks, names, range(seed, seed + seeds), say=partial(typer.echo, err=True))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; the same command goes on with what {out} has") from None
    found = statistics(read_records(folder), simulate or ())
    write_report(folder, found)
    if as_json:
        options.print_json(found.summary())
        return
    typer.echo(f"{len(found.runs)} runs; figures, tables and what they mean: {folder.page}")


def short_names(datasets: Sequence[str]) -> list[str]:
    """Name data sets as figures do: the last part of a path, without its ending.

    Raises:
        DataError: Two have the same name.
    """
    from trady.errors import DataError

    names = [Path(dataset).stem or dataset for dataset in datasets]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise DataError(f"several data sets are called {', '.join(sorted(doubles))}; rename or link one of them")
    return names


def _check_budget(budget: str, policy: str) -> None:
    from trady.errors import PolicyError
    from trady.planning.budget import parse_budget
    from trady.policies import get_policy

    parse_budget(budget)
    if get_policy(policy).name in ("full", "head"):
        raise PolicyError(f"--policy {policy} takes no budget: leave --budget out to train every weight")


def _task(
    model: str, dataset: str, name: str, image_size: int | None, limit: int | None, on_unreadable: str, seed: int
) -> StudyTask:
    from trady.study.run import StudyTask
    from trady.training.models.load import load_model

    task = load_task(model, dataset, image_size, limit, on_unreadable, seed)
    classes = len(task.data.classes)
    return StudyTask(
        name,
        task.data.train,
        task.data.evaluation,
        lambda seed: load_model(model, classes, seed=seed).model,
    )
