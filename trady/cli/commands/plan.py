"""``trady plan``: what a budget buys, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trady.cli import options
from trady.cli.choices import choice
from trady.cli.planned_texts import plan_texts, refuse_for_plan

if TYPE_CHECKING:
    from trady.planning.request import Request
    from trady.simulation.optimizer_memory import OptimizerMemory
    from trady.training.models.planned import Planned


def plan(
    model: options.PlannedModel,
    dataset: Annotated[
        str | None, typer.Argument(help="Texts, as for trady finetune: the plan is for their longest batch.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help='What may be taken: "300 MiB" (by a step), "process:400 MiB" (by all in memory), "update:1 MiB", '
            '"elements:27946" or "80%" (of what is free). auto, the default: what an inference pass takes. Or --sweep.',
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="A batch of text in place of images: sequences x length, e.g. 4x1024.")
    ] = None,
    dtype: options.Dtype = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = 32,
    micro_batch: options.MicroBatch = None,
    classes: options.Classes = 10,
    policy: options.Policy = "trady",
    scheme: options.Scheme = None,
    train: options.Train = None,
    freeze: options.Freeze = None,
    max_step_flops: options.MaxStepFlops = None,
    calls_per_step: Annotated[
        int, typer.Option(min=1, help="How often your loop calls the model before backward(): 3 for triplets.")
    ] = 1,
    accumulates: Annotated[
        bool, typer.Option("--accumulates", help="Your loop adds up the gradients of several passes.")
    ] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="How many processes train together, each with a batch of its own.")
    ] = 1,
    optimizer: Annotated[
        str | None,
        choice(
            possible=options.OPTIMIZERS,
            panel=options.TRAINING,
            text="Whose memory is counted: that which trady finetune takes by default, sgd, or adamw on texts.",
        ),
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of sgd.", rich_help_panel=options.TRAINING)] = 0.0,
    recompute: options.Recompute = "auto",
    fidelity: options.Fidelity = "exact",
    ranking: options.RankingFile = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also show the peak over the share of channels that trains.")
    ] = False,
    sweep: Annotated[
        str | None, typer.Option(help='Tabulate several budgets instead: "100 MiB, 200 MiB, 400 MiB".')
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help='Batch sizes for --sweep: "8,16,32".')] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, however many.")] = False,
    seed: options.Seed = 0,
    out: Annotated[str | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show what would train, what is kept, what is recomputed, and what a step takes. Nothing is allocated."""
    from trady.errors import BudgetError
    from trady.planning.budget import parse_budget
    from trady.training.models.planned import make_planned
    from trady.training.rates import usual_optimizer

    if budget is not None and sweep is not None:
        raise BudgetError('give either one budget, --budget "300 MiB", or several, --sweep "100 MiB, 200 MiB"')
    if batch_sizes is not None and sweep is None:
        raise BudgetError("--batch-sizes belongs to --sweep")
    budgets = _parts(sweep) if sweep is not None else [budget or "auto"]
    for text in budgets if sweep is not None else ():
        parse_budget(text)
    sizes = _whole_numbers(batch_sizes) if batch_sizes is not None else None
    request = options.read_request(
        budget=budgets[0],
        policy=policy,
        scheme=scheme,
        ranking=ranking,
        seed=seed,
        train=train,
        freeze=freeze,
        max_step_flops=max_step_flops,
        calls_per_step=calls_per_step,
        accumulates=accumulates,
        recompute=recompute,
        fidelity=fidelity,
        micro_batch=micro_batch,
        ranks=ranks,
    )
    if dataset is not None:
        refuse_for_plan(dataset, tokens, image_size)
        planned, loss = plan_texts(model, dataset, batch_size, dtype, seed)
        request = replace(request, loss=loss)
    else:
        planned = make_planned(model, classes, image_size, batch_size, tokens, dtype, seed)
    memory = _memory(optimizer or usual_optimizer("images" if dataset is None else "texts"), momentum)
    if sweep is not None:
        _sweep(planned, request, memory, budgets, sizes or [planned.batch_size], out, as_json)
    else:
        _one(planned, request, memory, curve, layers, out, as_json)


def _memory(optimizer: str, momentum: float) -> OptimizerMemory:
    """What an optimizer takes, by its name."""
    import torch

    from trady.training.optimizers import memory_of, optimizer_factory

    return memory_of(optimizer_factory(optimizer, 1.0, momentum, 0.0), torch.device("cpu"))


def _one(
    planned: Planned,
    request: Request,
    optimizer: OptimizerMemory,
    curve: bool,
    layers: bool,
    out: str | None,
    as_json: bool,
) -> None:
    from trady.planning.forecast import SHARES, forecast
    from trady.planning.forecast_tables import curve_view
    from trady.planning.plan import ROWS, view

    with _progress("planning", None):
        shares = SHARES if curve else ()
        found = forecast(planned.model, planned.example, request, shares=shares, optimizer=optimizer)
    _write(out, found.to_json())
    if as_json:
        options.print_json(found.to_json())
        return
    options.print_rich(view(found.plan, least_budget_bytes=found.least_budget_bytes, rows=None if layers else ROWS))
    if found.traffic is not None:
        options.print_rich(str(found.traffic))
    if found.curve:
        limit = found.plan.budget
        amount = None if limit is None else limit.peak_bytes
        options.print_rich(curve_view(found.curve, amount))


def _sweep(
    planned: Planned,
    request: Request,
    optimizer: OptimizerMemory,
    budgets: list[str],
    sizes: list[int],
    out: str | None,
    as_json: bool,
) -> None:
    from trady.planning.forecast import sweep
    from trady.planning.forecast_tables import sweep_view

    batches = ((size, planned.of_size(size)) for size in sizes)
    with _progress("planning", len(budgets) * len(sizes)) as done:
        cells = sweep(planned.model, request, budgets, batches, done, optimizer)
    value = {"model": type(planned.model).__name__, "policy": request.policy, "cells": [asdict(c) for c in cells]}
    _write(out, value)
    if as_json:
        options.print_json(value)
    else:
        options.print_rich(sweep_view(cells, planned.unit))


def _write(out: str | None, value: Any) -> None:
    if out is not None:
        from trady.records.files import write_json

        write_json(Path(out), value)


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show on a terminal, on standard error, how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    counted = (BarColumn(bar_width=16), MofNCompleteColumn()) if total is not None else ()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _parts(text: str) -> list[str]:
    """Cut at commas, but not at those inside of a number (27,946)."""
    import re

    return [part for part in (p.strip() for p in re.split(r",(?!\d{3}(?!\d|\s*[A-Za-z]))|;", text)) if part]


def _whole_numbers(text: str) -> list[int]:
    from trady.errors import BudgetError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BudgetError(f"--batch-sizes {text!r} cannot be read; type numbers of samples, e.g. 8,16,32")
    return [int(part) for part in parts]
