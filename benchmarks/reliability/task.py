"""A small training in a process of its own, which writes down what it has done before anybody can stop it.

Processes are forked from one that has imported everything, so that they take a second and not ten. What is stopped is a
process of its own all the same, with its own files, memory and signal handlers.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trady.errors import ResourceError, TradyError
from trady.training import saver
from trady.training.checkpoint import Checkpoint, save_checkpoint
from trady.training.data.datasets import CENTERED, ImageDataset
from trady.training.interrupt import Stopped
from trady.training.metrics import EpochMetrics
from trady.training.progress import Silent
from trady.training.run import finetune

CLASSES, SIZE, BATCH = 3, 12, 8

#: What a process ends with: refused, out of disk or memory, or by a mistake of the program.
REFUSED, NO_ROOM, MISTAKE = 2, 3, 70


class Network(nn.Module):
    """Three convolutions, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Take images ``[N, 3, H, W]`` to scores ``[N, CLASSES]``."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        scores: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return scores


class Shifted(Dataset[tuple[Tensor, int]]):
    """Images that are shifted by random numbers of torch's, NumPy's and Python's own, as transforms take them."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        drawn = float(torch.rand(())) + float(np.random.random()) + random.random()  # noqa: NPY002
        return image + 0.1 * drawn, label


def images(count: int, seed: int) -> ImageDataset:
    """Noise, brighter in the channel that the label names."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    pixels = rng.integers(0, 190, (count, SIZE, SIZE, 3))
    pixels[np.arange(count), :, :, labels] += 40
    return ImageDataset(pixels.astype(np.uint8), labels, SIZE, CENTERED, ("red", "green", "blue"))


#: What a run may keep that a restart has to bring back: rankings that are learnt, moments, augmentation, evidence,
#: draws inside an epoch, and data that takes random numbers itself.
SETUPS: dict[str, dict[str, Any]] = {
    "trady, ranking learnt, AdamW, augmented": {
        "budget": "elements:900",
        "policy": "trady",
        "ranking": "online",
        "optimizer": "adamw",
        "lr": 0.01,
        "augment": "light",
    },
    "velocity, measured in each epoch, SGD with momentum, 3 draws": {
        "budget": "elements:900",
        "policy": "velocity",
        "momentum": 0.9,
        "lr": 0.05,
        "draws_per_epoch": 3,
        "observed_batches": 2,
    },
    "full, images shifted at random, SGD with momentum": {"policy": "full", "momentum": 0.9, "lr": 0.05},
}


def warm_up() -> None:
    """Import and compile all that a run needs, in the process that the others are forked from."""
    for setup in SETUPS:
        _finetune(setup, None, images(4 * BATCH, 0), 1, None, Silent())


def _finetune(
    setup: str, out: Path | None, data: ImageDataset, epochs: int, checkpoint_seconds: float | None, display: Silent
) -> None:
    torch.manual_seed(0)
    finetune(
        Network(),
        Shifted(data) if setup.startswith("full") else data,
        images(48, 1),
        epochs=epochs,
        out=out,
        batch_size=BATCH,
        resume=out is not None,
        seed=5,
        checkpoint_every=checkpoint_seconds,
        progress=display,
        **SETUPS[setup],
    )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        folder: Its run folder.
        journal: The file that it writes down in what it has done; not in the run folder.
        setup: Name of what it trains.
        epochs: Passes over the data.
        train_images: Images to train on.
        checkpoint_seconds: How often it is saved inside an epoch.
        file_bytes: Largest file that it may write; ``None`` is no limit.
    """

    folder: Path
    journal: Path
    setup: str
    epochs: int = 4
    train_images: int = 240
    checkpoint_seconds: float = 0.05
    file_bytes: int | None = None

    def start(self) -> int:
        """Start or resume it in a process; return the process' number."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = MISTAKE
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # whatever this command was started with, such as nohup
        try:
            errors = os.open(f"{self.journal}.errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(errors, 2)
            code = self._work()
        finally:
            os._exit(code)

    def _work(self) -> int:
        if self.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with Journal(self.journal, self.train_images // BATCH).watching() as journal:
                data = images(self.train_images, 0)
                _finetune(self.setup, self.folder, data, self.epochs, self.checkpoint_seconds, journal)
        except Stopped as stop:
            return int(stop.code or 0)
        except TradyError as error:
            print(error, file=sys.stderr, flush=True)
            return NO_ROOM if isinstance(error, ResourceError) else REFUSED
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            return MISTAKE
        return 0


class Journal(Silent):
    """Writes a line for every step that is done and every checkpoint that is complete, in one write each."""

    def __init__(self, path: Path, steps_an_epoch: int) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.steps_an_epoch, self.step_number = steps_an_epoch, 0

    @contextmanager
    def watching(self) -> Iterator[Journal]:
        """Be told of checkpoints."""

        def saved(folder: Path, checkpoint: Checkpoint) -> None:
            save_checkpoint(folder, checkpoint)
            self.note(f"saved {checkpoint.step}")

        self.note("started 0")
        with patch.object(saver, "save_checkpoint", saved):
            yield self
        self.note("ended 0")

    def note(self, line: str) -> None:
        """Write a line down."""
        os.write(self.file, f"{line}\n".encode())

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Know which step comes next."""
        self.step_number = (epoch + 1) * self.steps_an_epoch - steps

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        """Note a step."""
        self.step_number += 1
        self.note(f"step {self.step_number}")

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Note an epoch."""
        self.note(f"epoch {metrics.epoch}")
