"""The table of all cells: from their folders, and on disk for people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trady.compare.cells import Job
from trady.compare.execute import Workplace
from trady.compare.rows import Row, make_row
from trady.errors import StateError
from trady.records.files import write_lines, write_whole
from trady.records.versioned import Format

RESULTS = Format(
    None,
    "table of results",
    StateError,
    "move it away: it is made again from the cells that are still there",
    version=None,
)
LINES = "results.jsonl"
TABLE = "results.parquet"
#: Rows of cells that are done and not in the matrix of the last call; another matrix may need them again.
OTHERS = "other_cells.jsonl"


def collect(jobs: Sequence[Job], place: Workplace) -> list[Row]:
    """Return a row for every cell, from its folder, or from earlier results if the folder is gone."""
    known = _done_rows(place.out)
    rows = []
    for job in jobs:
        row = make_row(place.cell_folder(job))
        rows.append(row if row.done else known.get(row.digest, row))
    return rows


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file such as ``results.jsonl``; none where there is no such file.

    Raises:
        StateError: It is damaged.
    """
    return RESULTS.read_lines(Row, path) if path.exists() else []


def done_digests(out: Path) -> set[str]:
    """Return the cells in the written results, which need no folder and are not run again."""
    return set(_done_rows(out))


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """Write ``results.jsonl`` and ``results.parquet``; what they held of other cells goes to ``other_cells.jsonl``."""
    out.mkdir(parents=True, exist_ok=True)
    mine = {row.digest for row in rows}
    others = [row for digest, row in _done_rows(out).items() if digest not in mine]
    if others or (out / OTHERS).exists():
        _write_lines(others, out / OTHERS)
    _write_lines(rows, out / LINES)
    write_whole(out / TABLE, lambda place: _write_parquet(rows, place))


def _done_rows(out: Path) -> dict[str, Row]:
    return {row.digest: row for name in (OTHERS, LINES) for row in read_rows(out / name) if row.done}


def _write_lines(rows: Sequence[Row], path: Path) -> None:
    write_lines(path, (json.dumps(row.to_json(), allow_nan=False) for row in rows))


def _write_parquet(rows: Sequence[Row], place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "Mapping[str, Any]": pa.string()}
    schema = pa.schema([(name, kinds[str(kind).removesuffix(" | None")]) for name, kind in Row.__annotations__.items()])
    pq.write_table(pa.Table.from_pylist([_flat(row) for row in rows], schema), place)


def _flat(row: Row) -> dict[str, Any]:
    return {**row.to_json(), "settings": json.dumps(dict(row.settings), sort_keys=True)}
