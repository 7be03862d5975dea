"""``trady measure``: where the memory of a training step goes."""

from __future__ import annotations

from typing import Annotated

import typer

from trady.cli import options
from trady.cli.example import make_example


def measure(
    model: options.Model,
    budget: Annotated[
        str | None, typer.Option(help="Train inside this budget; without one, everything trains.")
    ] = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = 32,
    classes: options.Classes = 10,
    policy: options.Policy = "trady",
    recompute: options.Recompute = "auto",
    fidelity: options.Fidelity = "exact",
    ranking: options.RankingFile = None,
    seed: options.Seed = 0,
    out: Annotated[str | None, typer.Option(help="Also write the ledger to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Run one training step and account for its memory."""
    from trady.cli.timed_steps import full_step, tuned_step
    from trady.errors import BudgetError

    request = options.read_request(
        budget=budget, policy=policy, ranking=ranking, seed=seed, recompute=recompute, fidelity=fidelity
    )
    if budget is None and (recompute, fidelity) != ("auto", "exact"):
        raise BudgetError("--recompute and --fidelity belong to --budget: without one, PyTorch trains the whole model")
    example = make_example(model, classes, image_size, batch_size, seed)
    step = full_step(example) if budget is None else tuned_step(example, request)
    ledger = step.ledger()
    if out is not None:
        ledger.save(out)
    if as_json:
        options.print_json(ledger.to_json())
    else:
        options.print_rich(ledger)
