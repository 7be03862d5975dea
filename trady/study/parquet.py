"""Records as Parquet: one file an epoch for the norms, one for the noise.

``norms``: one row a step and layer, ``squared_norms`` a list with one number an input channel.
``noise``: one row a layer, the fields of :class:`trady.study.noise.LayerNoise`.
Both begin with ``dataset``, ``seed`` and ``epoch``, so that any reader takes all files of a folder together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trady.errors import StateError
from trady.records.files import write_whole
from trady.records.reading import check_regular
from trady.study.estimate import Estimate
from trady.study.folder import Unit
from trady.study.noise import LayerNoise
from trady.study.power_laws import Comparison, PowerLaw
from trady.study.recorder import EpochRecord
from trady.study.settings import FORMAT

_ESTIMATE = pa.struct([("value", pa.float64()), ("low", pa.float64()), ("high", pa.float64()), ("samples", pa.int64())])
_COMPARISON = pa.struct([("ratio", pa.float64()), ("p", pa.float64())])
_POWER_LAW = pa.struct(
    [
        ("exponent", pa.float64()),
        ("threshold", pa.float64()),
        ("tail", pa.int64()),
        ("against_lognormal", _COMPARISON),
        ("against_exponential", _COMPARISON),
    ]
)
_UNIT = [("dataset", pa.string()), ("seed", pa.int64()), ("epoch", pa.int64())]
_NORMS = pa.schema(
    [*_UNIT, ("step", pa.int64()), ("layer", pa.string()), ("squared_norms", pa.list_(pa.float32()))],
    metadata={"format": "trady-study-norms-1"},
)
_NOISE = pa.schema(
    [
        *_UNIT,
        ("layer", pa.string()),
        ("values", pa.int64()),
        ("zeros", pa.float64()),
        ("stable", _ESTIMATE),
        ("gaussian", _ESTIMATE),
        ("hill", _ESTIMATE),
        ("power_law", _POWER_LAW),
        ("quantiles", pa.list_(pa.float64())),
    ],
    metadata={"format": "trady-study-noise-1"},
)

#: Layer name to ‖∂L/∂W[:, c]‖₂², [recorded steps, channels].
Norms = Mapping[str, npt.NDArray[np.float32]]


def write_norms(path: Path, unit: Unit, record: EpochRecord) -> None:
    """Write the norms of an epoch."""
    layers = list(record.norms)
    rows = [(step, layer, record.norms[layer][at]) for at, step in enumerate(record.steps) for layer in layers]
    columns = {
        **_unit_columns(unit, len(rows)),
        "step": [step for step, _, _ in rows],
        "layer": [layer for _, layer, _ in rows],
        "squared_norms": [norms for _, _, norms in rows],
    }
    _write(path, pa.table(columns, schema=_NORMS))


def write_noise(path: Path, unit: Unit, noise: list[LayerNoise]) -> None:
    """Write the noise of an epoch."""
    rows = [{"dataset": unit.dataset, "seed": unit.seed, "epoch": unit.epoch, **asdict(layer)} for layer in noise]
    _write(path, pa.Table.from_pylist(rows, schema=_NOISE))


def read_norms(path: Path) -> tuple[tuple[int, ...], Norms]:
    """Return the recorded steps, and the norms of each layer.

    Raises:
        StateError: The file is damaged.
    """
    table = _read(path, _NORMS)
    steps = tuple(dict.fromkeys(table["step"].to_pylist()))
    norms: dict[str, list[npt.NDArray[np.float32]]] = {}
    with FORMAT.named(path), FORMAT.reading():
        for layer, values in zip(table["layer"].to_pylist(), table["squared_norms"], strict=True):
            if values.values is None or values.values.null_count:
                raise ValueError(f"norms of layer {layer!r} are missing")
            norms.setdefault(layer, []).append(values.values.to_numpy(zero_copy_only=False))
        found = {layer: np.stack(values) for layer, values in norms.items()}
        if not found or {len(values) for values in found.values()} != {len(steps)}:
            raise ValueError("not every layer has norms of every step")
    return steps, found


def read_noise(path: Path) -> list[LayerNoise]:
    """Return the noise of every layer.

    Raises:
        StateError: The file is damaged.
    """
    rows = _read(path, _NOISE).to_pylist()
    with FORMAT.named(path), FORMAT.reading():
        return [_layer_noise(row) for row in rows]


def _unit_columns(unit: Unit, count: int) -> dict[str, list[Any]]:
    return {"dataset": [unit.dataset] * count, "seed": [unit.seed] * count, "epoch": [unit.epoch] * count}


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda place: pq.write_table(table, place, compression="zstd", write_page_checksum=True))


def _read(path: Path, expected: pa.Schema) -> pa.Table:
    again = "remove that run's folder and run it again"
    try:
        check_regular(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            # Not its metadata, chunk by chunk: where these are damaged, pyarrow ends the process.
            table = file.read()
            table.validate(full=True)
    except (ArithmeticError, MemoryError, OSError, RuntimeError, TypeError, ValueError, pa.ArrowException) as error:
        # pyarrow says that memory ran out where a damaged file asks for an absurd amount of it.
        raise StateError(f"{path} cannot be read ({str(error)[:200]}); {again}") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != expected.metadata[b"format"]:
        raise StateError(f"{path} is not what a study of this version of trady writes")
    if not table.schema.remove_metadata().equals(expected.remove_metadata()):
        raise StateError(f"{path} has other columns than a study writes; {again}")
    return table


def _complete(value: object) -> bool:
    """Return whether nothing inside of a value is missing."""
    if isinstance(value, (dict, list)):
        return all(map(_complete, value.values() if isinstance(value, dict) else value))
    return value is not None


def _layer_noise(row: dict[str, Any]) -> LayerNoise:
    def estimate(values: dict[str, Any] | None) -> Estimate | None:
        return None if values is None else Estimate(**values)

    estimates = ("stable", "gaussian", "hill", "power_law")
    if not all(_complete(value) for name, value in row.items() if value is not None or name not in estimates):
        raise ValueError(f"numbers of layer {row['layer']!r} are missing")
    law = row["power_law"]
    if law is not None:
        rivals = {name: Comparison(**law[name]) for name in ("against_lognormal", "against_exponential")}
        law = PowerLaw(law["exponent"], law["threshold"], law["tail"], **rivals)
    return LayerNoise(
        row["layer"],
        row["values"],
        row["zeros"],
        estimate(row["stable"]),
        estimate(row["gaussian"]),
        estimate(row["hill"]),
        law,
        tuple(row["quantiles"]),
    )
