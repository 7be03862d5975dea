"""``trady plan``: what a budget buys, before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from trady.commands import options
from trady.commands.example import load_ranking, make_example


def plan(
    model: options.Model,
    budget: options.Budget,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = 32,
    classes: options.Classes = 10,
    policy: options.Policy = "trady",
    ranking: options.RankingFile = None,
    seed: options.Seed = 0,
    out: Annotated[str | None, typer.Option(help="Also write the plan to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show which layers would train, and what that takes."""
    import trady

    example = make_example(model, classes, image_size, batch_size, seed)
    made = trady.plan(
        example.model,
        example.images,
        budget=budget,
        policy=policy,
        ranking=load_ranking(ranking),
        seed=seed,
    )
    if out is not None:
        made.save(out)
    if as_json:
        options.print_json(made.to_json())
    else:
        options.print_rich(made)
