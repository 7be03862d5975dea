"""``trady compare``: a matrix of runs, and their table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trady.cli import options
from trady.errors import MatrixError

if TYPE_CHECKING:
    from trady.compare.execute import Keep
    from trady.compare.matched import Metric
    from trady.compare.run import EngineName


def compare(
    matrix: Annotated[Path, typer.Argument(help="The matrix file, in TOML (docs/compare.md).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the cells and the table; runs/ and the file's name by default.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at a time; one a processor by default.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch in each worker; the processors shared out by default.")
    ] = None,
    gpus_per_cell: Annotated[
        float | None, typer.Option(help="Share of a GPU that a cell takes, e.g. 0.5; no more cells at a time than fit.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that failed or were infeasible.")
    ] = False,
    summary_only: Annotated[
        bool, typer.Option("--summary-only", help="Run nothing; write the table of what is there.")
    ] = False,
    keep: Annotated[
        str, typer.Option(help="What a finished cell keeps: results (what the table needs), or weights too.")
    ] = "results",
    dataset: Annotated[
        list[str] | None, typer.Option(help="NAME=SOURCE: another source for one of the file's data sets.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="What is compared: accuracy (after the last epoch) or best_accuracy.")
    ] = "accuracy",
    as_json: options.Json = False,
) -> None:
    """Run a matrix of models × data sets × budgets × policies × seeds, and compare the policies."""
    _check_extra()
    from trady.compare.run import compare as run
    from trady.compare.show import view

    for name, value, possible in (
        ("engine", engine, ("local", "ray")),
        ("keep", keep, ("results", "weights")),
        ("metric", metric, ("accuracy", "best_accuracy")),
    ):
        if value not in possible:
            raise MatrixError(f"--{name} {value!r} is not known; type one of {', '.join(possible)}")
    folder = out or Path("runs") / matrix.stem
    try:
        table = run(
            matrix,
            folder,
            engine=cast("EngineName", engine),
            workers=workers,
            threads=threads,
            gpus_per_cell=gpus_per_cell,
            max_minutes=max_minutes,
            retry_failed=retry_failed,
            summary_only=summary_only,
            keep=cast("Keep", keep),
            datasets=_sources(dataset or []),
            metric=cast("Metric", metric),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what is done is kept in {folder}: the same command goes on") from None
    if as_json:
        options.print_json({"out": str(table.out), "complete": table.complete, **table.summary.to_json()})
        return
    options.print_rich(view(table.summary))
    typer.echo(f"{sum(row.done for row in table.rows)} of {len(table.rows)} cells are done; see {folder}/report.html")
    if not table.complete:
        typer.echo("the time was up: the same command goes on", err=True)


def _sources(texts: list[str]) -> dict[str, str]:
    sources: dict[str, Any] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise MatrixError(f"--dataset {text!r} is not NAME=SOURCE, e.g. cifar10=data/cifar10.npz")
        sources[name] = source
    return sources


def _check_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("pydantic", "pyarrow", "scipy", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MatrixError(f'{", ".join(missing)} is not installed: pip install "trady[compare]"')
