"""``trady fit``: will it fit, for any method, before there is a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trady.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from trady.estimates.report import FitReport

#: A test holds them equal to those of trady.estimates, so that ``--help`` need not load it.
METHODS = (
    "full, checkpoint, lora, lora-checkpoint, qlora, qlora-checkpoint, qlora-8bit, qlora-8bit-checkpoint, bitfit, "
    "head, last-N, trady"
)
USUAL = "full,checkpoint,lora,lora-checkpoint,qlora,qlora-checkpoint,bitfit,head,last-2,trady"
OPTIMIZERS = "sgd, sgd-momentum, adam, adamw, adafactor"

EXAMPLES = """Example: trady fit llama/config.json --dtype bfloat16 --batch-size 4 --length 768 --memory 24GiB

Or: trady fit bert-base-uncased --methods full,lora,qlora --rank 16 --targets query,value

Or: trady fit my_models:resnet --image-size 224 --batch-size 32 --plot fit.svg
"""


def fit(
    model: options.PlannedModel,
    memory: Annotated[
        str | None,
        typer.Option(help="What a step may take, e.g. 16GiB: look for the largest batch and the longest sequence."),
    ] = None,
    methods: Annotated[str, typer.Option(help=f"Which ones, out of {METHODS}.")] = USUAL,
    budget: Annotated[list[str] | None, typer.Option(help="Plan TraDy in this budget too; repeat for more.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 8,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence; by default 512, or as many as the model takes.")
    ] = None,
    image_size: options.ImageSize = None,
    classes: options.Classes = 10,
    dtype: options.Dtype = None,
    optimizer: Annotated[str, typer.Option(help=f"What updates: {OPTIMIZERS}.")] = "adamw",
    autocast: Annotated[
        str | None, typer.Option(help="bfloat16 or float16: forward passes run under torch.autocast.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="package.module:function: a scalar of the model's output, where that is neither loss nor scores."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA's adapters.")] = 8,
    targets: Annotated[
        str,
        typer.Option(help="Where adapters stand: all, peft (its own choice), or names of layers: q_proj,v_proj."),
    ] = "all",
    blocks: Annotated[
        str | None, typer.Option(help="Class names of the model's blocks, where they are not found: Block,Stage.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda: how the optimizer steps, and cuBLAS' workspaces. By default cuda where there is one."
        ),
    ] = None,
    seed: options.Seed = 0,
    plot: Annotated[str | None, typer.Option(help="Also draw the peaks into this .svg, .png or .pdf file.")] = None,
    out: Annotated[str | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show what a training step takes by several methods, and what fits in a memory. Nothing is allocated or run."""
    from trady.estimates.figure import check_ending, draw
    from trady.estimates.fit import fit as estimate

    if plot is not None:
        check_ending(plot)
    wanted = _names(methods)
    names = _names(targets)
    found: list[FitReport] = []
    try:
        with _progress(len(wanted) + len(budget or ()) + (memory is not None and "trady" in wanted)) as (done, at):

            def keep(report: FitReport) -> None:
                found.append(report)
                done()

            report = estimate(
                model,
                methods=wanted,
                memory=memory,
                budgets=budget or (),
                batch_size=batch_size,
                length=length,
                image_size=image_size,
                classes=classes,
                dtype=dtype,
                optimizer=optimizer,
                autocast=autocast,
                loss=loss,
                rank=rank,
                targets=names[0] if len(names) == 1 else names,
                blocks=_names(blocks or ""),
                device=device,
                seed=seed,
                done=keep,
                at=at,
            )
    except KeyboardInterrupt:
        if found:
            _show(found[-1], out, as_json)
        rows = len(found[-1].rows) if found else 0
        raise KeyboardInterrupt(f"stopped: {rows} of {len(wanted)} methods are told") from None
    _show(report, out, as_json)
    if plot is not None:
        draw(report, plot)


def _show(report: FitReport, out: str | None, as_json: bool) -> None:
    if out is not None:
        report.save(out)
    if as_json:
        options.print_json(report.to_json())
    else:
        options.print_rich(report, width=160)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[], object], Callable[[str], object]]]:
    """Show on a terminal, on standard error, which method and batch is under way."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading the model", total=total)
        yield (lambda: progress.advance(task)), (lambda what: progress.update(task, description=what))
