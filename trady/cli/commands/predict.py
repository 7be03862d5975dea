"""``trady predict``: what a finished run says of images and texts it has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from trady.cli import options
from trady.cli.predicted_texts import predicted_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from trady.prediction.outcome import Outcome
    from trady.training.description import RunDescription, Which

EXAMPLES = """Example: trady predict runs/photos photo.jpg

Or: trady predict runs/photos holiday/ --top 3 --out holiday.csv

Or: trady predict runs/photos photos/val --weights best --json

Or: trady predict runs/reviews "what a film" reviews.csv
"""


def predict(
    run: Annotated[str, typer.Argument(help="The run folder that trady finetune has written.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images; folders, with all images below them; a .npz file; fashion-mnist. Of a run on texts: tables, "
            "texts in quotes, or - for standard input. Where folders or labels name the classes, the accuracy is told "
            "too.",
        ),
    ],
    weights: Annotated[
        str, typer.Option(help="Those after the last epoch (last), or after the one of the highest accuracy (best).")
    ] = "last",
    top: Annotated[int, typer.Option(min=1, help="Name the n most likely classes of each image.")] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a forward pass; by default as many as the run's budget has room for."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a language model adds to a text.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="A language model takes the likeliest token (0), or draws others too.")
    ] = 0.0,
    out: Annotated[
        str | None, typer.Option(help="Write a CSV file with the columns path (or the text's own), label and score.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say which class images or texts are of, or what comes after a text, by the model of a run."""
    from trady.errors import DataError
    from trady.training.description import read_description

    description = read_description(run)
    if description.texts is not None:
        outcome = predicted_texts(
            run, sources, cast("Which", weights), top, batch_size, max_new_tokens, temperature, description
        )
    elif description.images is not None:
        outcome = _images(run, sources, cast("Which", weights), top, batch_size, description)
    else:
        raise DataError(
            f"{run} was trained on data that trady did not read, so it does not know how an input is prepared; use "
            "trady.load(run, model=module).model in a program of yours"
        )
    predictions = outcome.predictions
    if outcome.unreadable == len(predictions):
        first = next(prediction for prediction in predictions if prediction.error is not None)
        raise DataError(
            f"none of the {len(predictions)} {'images' if description.texts is None else 'texts'} could be read. The "
            f"first, {first.source}: {first.error}"
        )
    if out is not None:
        outcome.write_csv(Path(out))
    if as_json:
        options.print_json(outcome.to_json())
    else:
        options.print_rich(outcome, width=160)
        if out is not None:
            typer.echo(f"written to {out}")


def _images(
    run: str, sources: list[str], weights: Which, top: int, batch_size: int | None, description: RunDescription
) -> Outcome:
    import trady
    from trady.prediction.inputs import find_inputs
    from trady.prediction.outcome import Outcome

    assert description.images is not None
    inputs = find_inputs(sources, description.classes, description.images.size)
    predictor = trady.load(run, weights)
    for remark in inputs.remarks:
        typer.echo(remark, err=True)
    with _progress(len(inputs)) as done:
        predictions = []
        for each in predictor.predictions(inputs.sources, batch_size=batch_size, top=top, names=inputs.names):
            predictions.append(each)
            done()
    return Outcome(predictor, tuple(predictions), tuple(inputs.actual))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """Show on a terminal, on standard error, how many images are done and how long the rest takes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("images"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("images", total=total)
        yield lambda: progress.advance(task)
