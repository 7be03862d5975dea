"""The budget of a run that is given none: found once, and kept when the run is resumed."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import nn

from trady.planning.plan import Plan, draws_from
from trady.planning.request import AUTO, Request
from trady.report.units import format_count
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.training.batch import readable, split_batch
from trady.training.data.loaders import Batches
from trady.training.data.looking import first_of


def with_amount(
    request: Request,
    model: nn.Module,
    loader: Batches,
    device: torch.device,
    optimizer: OptimizerMemory,
    *,
    resumed: Path | None,
) -> Request:
    """Return a request with an amount where its budget is ``auto``; any other as it is.

    Args:
        request: What is asked for.
        model: The model, on its device.
        loader: Batches to train on; the first is looked at.
        device: Where the run is.
        optimizer: What the optimizer takes.
        resumed: The plan of the run that goes on, which has found its budget.
    """
    if request.budget != AUTO:
        return request
    if resumed is not None and resumed.exists():
        return replace(request, budget=Plan.load(resumed).budget)
    with closing(first_of(loader, 1)) as batches:
        example, _ = split_batch(send_to_device(next(readable(batches)), device))
    return request.resolved(model, example, optimizer=optimizer)


def told(plan: Plan, *, automatic: bool) -> str:
    """Say what a run trains, in what, and by which ranking.

    Args:
        plan: Of the run.
        automatic: Whether the budget is the one that was found.
    """
    limit = "no budget" if plan.budget is None else f"{plan.budget}{', what an inference pass takes' * automatic}"
    channels = f"{format_count(plan.cost.channels)} of {format_count(plan.table.channel_count)} input channels"
    return f"{plan.policy} trains {channels} in {limit}\ndraws from {draws_from(plan)}"
