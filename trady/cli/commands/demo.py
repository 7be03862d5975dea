"""``trady demo``: an ImageNet network learns Fashion-MNIST, three ways, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trady.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from trady.cli.demo_table import Row
    from trady.cli.example import Example
    from trady.planning.budget import Budget
    from trady.ranking.ranking import LayerRanking
    from trady.training.data.datasets import DataSplit
    from trady.training.result import Result

MODEL = "efficientnet-lite0"

DATASET = "fashion-mnist"

METHODS: tuple[str, ...] = ("head", "trady", "full")


@dataclass(frozen=True)
class Recipe:
    """How long the demo trains, and on what."""

    images: tuple[int, int]
    epochs: int
    timing_rounds: int
    image_size: int = 64
    batch_size: int = 32
    lr: float = 0.1
    full_lr: float = 0.05


LONG = Recipe(images=(2400, 1500), epochs=4, timing_rounds=9)

SHORT = Recipe(images=(640, 400), epochs=1, timing_rounds=5)


def demo(
    short: Annotated[bool, typer.Option("--short", help="One minute: fewer images, one epoch.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="What a training step may take, or all of the process; by default what inference takes."),
    ] = None,
    out: Annotated[str, typer.Option(help="Where the results go.")] = "runs/demo",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Fine-tune EfficientNet-Lite0 on Fashion-MNIST: head only, TraDy and everything, side by side."""
    from rich.console import Console

    from trady.cli.demo_table import as_table, draw
    from trady.planning.budget import Budget, parse_budget
    from trady.planning.process_memory import is_process, ready_for
    from trady.planning.scopes import PEAK
    from trady.records.files import write_json
    from trady.report.units import format_bytes
    from trady.training.data.load import load_data
    from trady.training.models.load import image_format

    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        console.width = 120
    recipe = SHORT if short else LONG
    given = None if budget is None else parse_budget(budget)
    ready_for(given)
    folder = Path(out)
    normalization, _ = image_format(MODEL)
    data = load_data(
        DATASET,
        image_size=recipe.image_size,
        limit=recipe.images,
        normalization=normalization,
        seed=seed,
    )
    inference_peak = _inference_peak(data, recipe, seed)
    limit = given or Budget(PEAK, inference_peak)
    console.print(
        f"{MODEL} on {len(data.train)} images of {DATASET} ({recipe.image_size} px), batches of "
        f"{recipe.batch_size}: one inference pass peaks at {format_bytes(inference_peak)}, "
        f"weights included. The budget is {limit}."
    )
    _show_plan(console, data, recipe, limit, seed)
    methods = METHODS
    if is_process(limit):
        methods = tuple(method for method in METHODS if method != "full")
        console.print("Full fine-tuning takes no budget, so it is left out: it would take what this process may not.")
    try:
        results = {method: _train(method, data, recipe, limit, folder, seed) for method in methods}
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the demo starts from the beginning") from None
    ranking = results["trady"].ranking
    if ranking is not None:
        known = f"measured on {ranking.measured_on}" if ranking.source == "prior" else "learnt in the first epoch"
        console.print(
            f"TraDy's pool: the {len(ranking.top())} of {len(ranking.scores)} layers that carry 97 % of the "
            f"reweighted gradient norm, {known}."
        )
    if is_process(limit):  # no room for models side by side
        speeds = {method: result.history[-1].samples_per_second for method, result in results.items()}
        seconds = {method: recipe.batch_size / speed for method, speed in speeds.items()}
    else:
        seconds = _time_steps(data, recipe, limit, ranking, seed)
    rows = [_row(method, results[method], seconds[method], inference_peak) for method in methods]
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    title = f"{MODEL}, {epochs} on {len(data.train)} images of {DATASET}, evaluated on {len(data.evaluation)}"
    process_peak = max((p for r in results.values() if (p := r.process_peak_bytes) is not None), default=None)
    written = {
        "budget": str(limit),
        "budget_bytes": limit.amount if limit.scope.in_bytes else None,
        "inference_peak_bytes": inference_peak,
        "model": MODEL,
        "dataset": DATASET,
        "train_images": len(data.train),
        "evaluation_images": len(data.evaluation),
        "image_size": recipe.image_size,
        "batch_size": recipe.batch_size,
        "epochs": recipe.epochs,
        "seed": seed,
        "process_peak_bytes": process_peak,
        "rows": [row.to_json() for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", written)
    pictures = draw(rows, title, folder)
    if as_json:
        options.print_json(written)
    else:
        console.print(as_table(rows, title))
        if process_peak is not None:
            console.print(f"all of them ran in one process, which took up to {format_bytes(process_peak)}")
        console.print(f"written: {folder / 'result.json'}, {', '.join(map(str, pictures))}")


def _example(data: DataSplit, recipe: Recipe, seed: int) -> Example:
    """Return the untouched model with a first batch."""
    from trady.cli.example import Example
    from trady.training.models.load import load_model

    images, labels = data.train.batch(range(recipe.batch_size))
    return Example(load_model(MODEL, len(data.classes), seed=seed).model, images, labels)


def _inference_peak(data: DataSplit, recipe: Recipe, seed: int) -> int:
    import torch

    import trady

    example = _example(data, recipe, seed)
    with torch.no_grad():
        peak = trady.measure(lambda: example.model(example.images), example.model).inference_peak_bytes
    assert peak is not None
    return peak


def _show_plan(console: Console, data: DataSplit, recipe: Recipe, limit: Budget, seed: int) -> None:
    import trady

    example = _example(data, recipe, seed)
    console.print(trady.plan(example.model, example.images, budget=limit, seed=seed))


def _train(method: str, data: DataSplit, recipe: Recipe, limit: Budget, folder: Path, seed: int) -> Result:
    from trady.training.models.load import load_model
    from trady.training.run import finetune

    return finetune(
        load_model(MODEL, len(data.classes), seed=seed).model,
        data.train,
        data.evaluation,
        budget=limit if method == "trady" else None,
        epochs=recipe.epochs,
        out=folder / method,
        batch_size=recipe.batch_size,
        lr=recipe.full_lr if method == "full" else recipe.lr,
        policy=method,
        seed=seed,
        overwrite=True,
    )


def _time_steps(
    data: DataSplit, recipe: Recipe, limit: Budget, ranking: LayerRanking | None, seed: int
) -> dict[str, float]:
    """Time the steps of all methods in turns; TraDy's with its pool settled, as after the first epoch."""
    from trady.cli.timed_steps import full_step, step_seconds, tuned_step
    from trady.planning.request import Request

    asked = {"head": Request(policy="head", seed=seed), "trady": Request(limit, "trady", ranking, seed=seed)}
    examples = {method: _example(data, recipe, seed) for method in METHODS}
    steps = {
        method: tuned_step(example, asked[method]) if method in asked else full_step(example)
        for method, example in examples.items()
    }
    return step_seconds(steps, recipe.timing_rounds)


def _row(method: str, result: Result, seconds: float, inference_peak: int) -> Row:
    from trady.cli.demo_table import Row

    return Row(
        method=method,
        accuracy=result.accuracy,
        saved_bytes=result.saved_bytes,
        peak_bytes=result.peak_bytes,
        inference_peak_bytes=inference_peak,
        step_seconds=seconds,
        trainable_parameters=result.trainable_parameters,
    )
