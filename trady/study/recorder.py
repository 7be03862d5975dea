"""What a study writes down while a model trains. The training goes as it would without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate.utils import send_to_device
from torch import Tensor

from trady.channels.selection import Channels
from trady.channels.table import ChannelTable
from trady.study.gradients import GradientSource
from trady.study.noise import LayerNoise, NoiseSample
from trady.training.data.datasets import epoch_seed
from trady.training.data.loaders import Batches, start_epoch
from trady.training.metrics import EpochMetrics
from trady.training.progress import Display
from trady.training.randomness import own_randomness

Norms = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EpochRecord:
    """What was seen in one epoch.

    Attributes:
        epoch: From 0.
        steps: The recorded steps, counted from the start of the run.
        norms: Layer name to ‖∂L/∂W[:, c]‖₂² of every channel, for each recorded step.
        noise: The gradient noise at the weights that the epoch began with.
    """

    epoch: int
    steps: tuple[int, ...]
    norms: dict[str, list[Norms]]
    noise: list[LayerNoise]


@dataclass
class Recorder:
    """Stands between the loop and its batches, and between the loop and its display.

    Attributes:
        table: The layers.
        source: Shows the gradients.
        batches: Training batches, as the loop would have them.
        noise_batches: Batches to measure the noise on, in an order of their own.
        noise_count: How many of them are taken at the beginning of each epoch.
        device: Where they go.
        every: One step in this many is recorded, and always the first of an epoch.
        seed: Of the run.
        display: Told of everything that the loop tells.
        write: Called with each epoch's record, before the loop writes its checkpoint.
    """

    table: ChannelTable
    source: GradientSource
    batches: Batches
    noise_batches: Batches
    noise_count: int
    device: Any
    every: int
    seed: int
    display: Display
    write: Callable[[EpochRecord], None]
    _epoch: int = field(default=0, init=False)
    _steps: list[int] = field(default_factory=list, init=False)
    _norms: dict[str, list[Norms]] = field(default_factory=dict, init=False)
    _noise: list[LayerNoise] = field(default_factory=list, init=False)

    # -- as batches ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        """Hand through what a loop or a loader's user may ask of the batches."""
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield the epoch's batches; what happens between two of them is the training step."""
        self._noise = self._measure_noise()
        for number, batch in enumerate(self.batches):
            if number % self.every:
                yield batch
                continue
            self._open(self._epoch * len(self) + number)
            with self.source.during(batch, self._see_norms):
                yield batch

    def _open(self, step: int) -> None:
        self._steps.append(step)
        for layer in self.table:
            self._norms[layer.name].append(np.zeros(layer.channels, dtype=np.float32))

    def _see_norms(self, name: str, channels: Channels, gradient: Tensor) -> None:
        squared = gradient.double().square().sum(1).cpu().numpy()
        self._norms[name][-1][channels] = squared

    def _measure_noise(self) -> list[LayerNoise]:
        sample = NoiseSample(self.table, epoch_seed(self.seed, 0, "noise coordinates"))
        with own_randomness():
            start_epoch(self.noise_batches, self._epoch)
            for number, batch in enumerate(islice(iter(self.noise_batches), self.noise_count)):
                sample.next_batch()
                seed = epoch_seed(self.seed, self._epoch, f"noise {number}")
                self.source.measure(send_to_device(batch, self.device), sample.see, seed)
        return sample.tails(epoch_seed(self.seed, self._epoch, "noise"))

    # -- as display ----------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Begin a new record."""
        self._epoch, self._steps = epoch, []
        self._norms = {layer.name: [] for layer in self.table}
        self.display.start_epoch(epoch, epochs, steps)

    def observing(self, epoch: int, epochs: int, passes: int) -> None:
        """Hand through, to displays that care."""
        if (tell := getattr(self.display, "observing", None)) is not None:
            tell(epoch, epochs, passes)

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        """Hand through."""
        self.display.step(loss, samples_per_second, peak_bytes)

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Write the record."""
        self.write(EpochRecord(self._epoch, tuple(self._steps), self._norms, self._noise))
        self.display.end_epoch(metrics)

    def close(self) -> None:
        """Hand through."""
        self.display.close()
