"""The records of a study, read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trady.channels.table import ChannelTable
from trady.errors import StateError
from trady.ranking.scores import Floats, layer_score
from trady.study.folder import StudyFolder, Unit
from trady.study.noise import LayerNoise
from trady.study.parquet import Norms, read_noise, read_norms
from trady.study.settings import StudySettings


@dataclass(frozen=True)
class Records:
    """All finished runs of a study.

    Attributes:
        settings: What they were made with.
        table: The layers.
        units: The recorded epochs, in order of data set, seed and epoch.
        norms: ‖∂L/∂W[:, c]‖₂² by unit and layer, [recorded steps, channels].
        noise: Tails of the gradient noise by unit, one entry a layer.
        accuracy: Top-1 accuracy on the evaluation images after each unit, 0 to 1.
    """

    settings: StudySettings
    table: ChannelTable
    units: tuple[Unit, ...]
    norms: Mapping[Unit, Norms]
    noise: Mapping[Unit, list[LayerNoise]]
    accuracy: Mapping[Unit, float]

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(dict.fromkeys(unit.dataset for unit in self.units))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(sorted({unit.seed for unit in self.units}))

    @cached_property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """Data set and seed of each run."""
        return tuple(dict.fromkeys((unit.dataset, unit.seed) for unit in self.units))

    @cached_property
    def without_gradient(self) -> tuple[str, ...]:
        """Layers that never saw a gradient, in any run."""
        return tuple(
            layer.name for layer in self.table if not any(self.norms[unit][layer.name].any() for unit in self.units)
        )

    def of(self, dataset: str, seed: int | None = None, epoch: int | None = None) -> tuple[Unit, ...]:
        """Return the units of a data set, and of a seed or epoch if one is given."""
        return tuple(
            unit
            for unit in self.units
            if unit.dataset == dataset and seed in (None, unit.seed) and epoch in (None, unit.epoch)
        )

    def steps(self, units: Iterable[Unit], layer: str) -> Floats:
        """Squared norms of a layer's channels in all recorded steps of the units, [steps, channels]."""
        return np.concatenate([self.norms[unit][layer] for unit in units]).astype(np.float64)

    def mean(self, units: Iterable[Unit]) -> dict[str, Floats]:
        """Mean over the recorded steps of the squared norms, layer by layer, [channels]."""
        units = tuple(units)
        return {layer.name: self.steps(units, layer.name).mean(0) for layer in self.table}

    def layer_rgn(self, units: Iterable[Unit]) -> dict[str, float]:
        """Layer RGN (arXiv 2510.19675) of the mean squared norms."""
        means = self.mean(units)
        return {layer.name: layer_score(means[layer.name], layer, "rgn") for layer in self.table}


def read_records(folder: StudyFolder) -> Records:
    """Read all finished runs of a study.

    Raises:
        StateError: There is none, or a file is missing or damaged.
    """
    from trady.training.run_folder import RunFolder

    settings = folder.load_settings()
    units = folder.units(settings.epochs)
    accuracy: dict[Unit, float] = {}
    for dataset, seed in dict.fromkeys((unit.dataset, unit.seed) for unit in units):
        for metrics in RunFolder(folder.run(dataset, seed)).history(settings.epochs - 1):
            accuracy[Unit(dataset, seed, metrics.epoch)] = metrics.quality
    table = folder.load_table()
    norms = {unit: read_norms(folder.norms(unit))[1] for unit in units}
    noise = {unit: read_noise(folder.noise(unit)) for unit in units}
    for unit in units:
        there = {name: values.shape[1] for name, values in norms[unit].items()}
        if there != {layer.name: layer.channels for layer in table}:
            raise StateError(
                f"{folder.norms(unit)} has other layers than {folder.table}; remove that run's folder and run it again"
            )
        if strangers := [each.layer for each in noise[unit] if each.layer not in table.by_name]:
            raise StateError(
                f"{folder.noise(unit)} has {strangers[0]!r}, which {folder.table} has not; "
                "remove that run's folder and run it again"
            )
    return Records(settings=settings, table=table, units=units, norms=norms, noise=noise, accuracy=accuracy)
