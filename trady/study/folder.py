"""The folder of a study and its files. Every file is complete or absent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trady.channels.table import ChannelTable, Layer
from trady.errors import ModelError, StateError
from trady.records import schema
from trady.records.files import remove_temporaries, write_json
from trady.records.schema import Positive
from trady.study.settings import FORMAT, StudySettings


@dataclass(frozen=True, order=True)
class Unit:
    """One epoch of one run.

    Attributes:
        dataset: Short name of the data set.
        seed: Of the run.
        epoch: From 0.
    """

    dataset: str
    seed: int
    epoch: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.dataset}-seed{self.seed}-epoch{self.epoch}"

    def __str__(self) -> str:
        return f"{self.dataset}, seed {self.seed}, epoch {self.epoch + 1}"


@dataclass(frozen=True)
class StudyFolder:
    """Paths of a study, under one folder."""

    path: Path

    @property
    def settings(self) -> Path:
        """What the runs were made with."""
        return self.path / "settings.json"

    @property
    def table(self) -> Path:
        """The layers and their costs."""
        return self.path / "layers.json"

    @property
    def statistics(self) -> Path:
        """The statistics; written last."""
        return self.path / "study.json"

    @property
    def page(self) -> Path:
        """The page with all figures."""
        return self.path / "index.html"

    @property
    def figures(self) -> Path:
        """Each figure as SVG and PNG."""
        return self.path / "figures"

    def run(self, dataset: str, seed: int) -> Path:
        """Folder of one run: its metrics, and its checkpoint until it is finished."""
        return self.path / "runs" / f"{dataset}-seed{seed}"

    def norms(self, unit: Unit) -> Path:
        """Norms of every channel, layer and recorded step."""
        return self.path / "norms" / f"{unit.name}.parquet"

    def noise(self, unit: Unit) -> Path:
        """Tails of the gradient noise, layer by layer."""
        return self.path / "noise" / f"{unit.name}.parquet"

    def has(self, unit: Unit) -> bool:
        """Whether an epoch is recorded."""
        return self.norms(unit).exists() and self.noise(unit).exists()

    def begin(self, settings: StudySettings) -> None:
        """Make the folder, or make sure that it is of a study with the same settings.

        Raises:
            StateError: It is not.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StateError(f"{self.path} is a file; name a folder for the study")
        remove_temporaries(self.path, alone=False)
        if self.settings.exists():
            settings.check_same(self.load_settings(), str(self.path))
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise StateError(f"{self.path} holds something that is not a study; name another folder by --out")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.settings, settings.to_json())  # first, so that a kill leaves a study or nothing
        for name in ("runs", "norms", "noise"):
            (self.path / name).mkdir(exist_ok=True)
            remove_temporaries(self.path / name, alone=False)

    def load_settings(self) -> StudySettings:
        """Read the settings.

        Raises:
            StateError: There is no study here.
        """
        return StudySettings.from_json(_read(self.settings, self.path), str(self.path))

    def keep_table(self, table: ChannelTable) -> None:
        """Write the layers, or make sure that they are the ones of the runs before.

        Raises:
            ModelError: They are not.
        """
        layers = table_to_json(table)
        if not self.table.exists():
            write_json(self.table, layers)
            return
        if _read(self.table, self.path) != json.loads(json.dumps(layers)):
            raise ModelError(
                f"the model's layers are not those of the runs in {self.path}; all runs of a study need the same model "
                "and image size"
            )

    def load_table(self) -> ChannelTable:
        """Read the layers.

        Raises:
            StateError: Nothing was recorded here.
        """
        data = _read(self.table, self.path)
        with FORMAT.named(self.table), FORMAT.reading():
            table = schema.read(_TableRecord, data)
            layers = ChannelTable(table.layers, batch=table.batch)
            layers.check_sizes()
            return layers

    def units(self, epochs: int) -> tuple[Unit, ...]:
        """Return the epochs of the runs that are finished, in order.

        Raises:
            StateError: There is none.
        """
        runs: list[tuple[str, int]] = []
        for result in sorted((self.path / "runs").glob("*/result.json")):
            dataset, _, seed = result.parent.name.rpartition("-seed")
            if not seed.lstrip("-").isdecimal():
                raise StateError(f"{result.parent} is no run of this study; move it away")
            runs.append((dataset, int(seed)))
        if not runs:
            raise StateError(f"no run of the study in {self.path} is finished; go on with trady study MODEL DATASET …")
        units = []
        for unit in (Unit(dataset, seed, epoch) for dataset, seed in sorted(runs) for epoch in range(epochs)):
            if not self.has(unit):
                raise StateError(f"{self.path} lacks the records of {unit}; remove that run's folder and run it again")
            units.append(unit)
        return tuple(units)


def table_to_json(table: ChannelTable) -> dict[str, Any]:
    """Return the layers as plain values."""
    return {"layers": [asdict(layer) for layer in table], "batch": table.batch}


@dataclass(frozen=True)
class _TableRecord:
    """What ``layers.json`` holds."""

    layers: tuple[Layer, ...]
    batch: Positive


def _read(path: Path, study: Path) -> Any:
    if not path.exists():
        raise StateError(f"there is no study in {study}: {path.name} is missing")
    return FORMAT.read_json(path)
