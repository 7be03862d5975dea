"""``trady search``: a scheme of sparse updates for a model, a data set and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trady.cli import options
from trady.cli.example import load_task


def search(
    model: options.Model,
    dataset: options.Images,
    budget: Annotated[str, typer.Option(help='What the scheme may take: "elements:27946".')],
    out: Annotated[str, typer.Option(help="Where the scheme is written; what was tried is kept beside it.")] = (
        "scheme.json"
    ),
    ratios: Annotated[str, typer.Option(help="Shares of a layer's channels to try.")] = "0.25,1",
    last: Annotated[
        int | None, typer.Option(min=1, help="Try up to n layers, from the output; all by default.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images for each try.")] = 1,
    batch_size: options.BatchSize = 32,
    lr: Annotated[float, typer.Option(help="Learning rate at the end of the warm-up.")] = 0.1,
    generations: Annotated[int, typer.Option(min=1, help="Of the evolutionary search.")] = 100,
    image_size: options.ImageSize = None,
    limit: options.Limit = None,
    on_unreadable: options.OnUnreadable = "refuse",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Find which layers to train, and how much of each, for --policy sparse-update.

    Every candidate is trained by itself on three quarters of the training images and judged on the rest.
    """
    from torch.utils.data import Subset

    import trady
    from trady.errors import BudgetError
    from trady.planning.budget import parse_budget
    from trady.planning.scopes import ELEMENTS
    from trady.search.contributions import Analysis, analyse, find_scheme
    from trady.search.evolution import Evolution
    from trady.training.data.datasets import epoch_order

    asked = parse_budget(budget)
    if asked.scope != ELEMENTS:
        raise BudgetError(f'a scheme is searched for a number of elements, not {budget!r}; type "elements:27946"')
    analysis = Analysis(_shares(ratios), last, epochs, batch_size, lr, seed)
    task = load_task(model, dataset, image_size, limit, on_unreadable, seed, split="train")
    images = task.data.train
    order = epoch_order(len(images), seed, 0).tolist()
    held_out = max(1, len(images) // 4)  # the evaluation images are for judging what comes out
    judge, train = Subset(images, order[:held_out]), Subset(images, order[held_out:])
    example, _ = images.batch(range(min(batch_size, len(images))))
    table = trady.plan(task.model, example, policy="head").table
    file = Path(out)
    kept = file.with_name(f"{file.stem}.contributions.json")

    def told(key: str, accuracy: float | None, done: int, count: int) -> None:
        if accuracy is not None:
            typer.echo(f"{done:4} of {count}: {key:12} accuracy {accuracy:.1%}", err=True)

    try:
        found = analyse(task.model, train, judge, table, asked.amount, analysis, file=kept, told=told)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what was tried is in {kept}, and the same command goes on") from None
    scheme = find_scheme(table, asked.amount, found, analysis, Evolution(generations=generations, seed=seed))
    scheme.save(file)
    elements = scheme.elements(table)
    if as_json:
        options.print_json({**scheme.to_json(), "elements": elements, "accuracies": dict(found.accuracies)})
        return
    for place, ratio in zip(scheme.layers, scheme.ratios, strict=True):
        typer.echo(f"layer {place:3}  {ratio:6.1%} of the channels, gain {found.gain(place, ratio):+.1%}")
    typer.echo(f"{elements} of {asked.amount} elements; written to {out}. Train it with:")
    typer.echo(f"trady finetune {model} {dataset} --policy sparse-update --scheme {out} --budget elements:{elements}")


def _shares(text: str) -> tuple[float, ...]:
    from trady.errors import PolicyError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PolicyError(f"--ratios {text!r} are no numbers; type shares such as 0.25,1") from None
