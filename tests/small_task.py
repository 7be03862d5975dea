"""A task that trains in a second: a small convolutional network and images of three colours."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trady.training.data.datasets import CENTERED, ImageDataset
from trady.training.metrics import EpochMetrics
from trady.training.progress import Silent

CLASSES = 3


class SmallNet(nn.Module):
    """Two convolutions with normalisation, dropout, and a classifier."""

    features: Any

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.features(x)))


class StopAfter(Silent):
    """Ctrl-C at the end of an epoch, before its checkpoint: so many epochs of the run are kept."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def end_epoch(self, metrics: EpochMetrics) -> None:
        if metrics.epoch == self.epochs:
            raise KeyboardInterrupt


class Raise(Silent):
    """Raises a signal in this process after so many steps, as somebody else would send it."""

    def __init__(self, number: int, after: int) -> None:
        self.number, self.after = number, after

    def step(self, loss: float, samples_per_second: float, peak_bytes: int) -> None:
        self.after -= 1
        if not self.after:
            signal.raise_signal(self.number)


def small_net(classes: int = CLASSES) -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return SmallNet(classes)


class TiedNet(nn.Module):
    """A small network whose classifier has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.again = self.net.classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def smooth_net(classes: int = CLASSES) -> SmallNet:
    """The same with GELU."""
    net = small_net(classes)
    net.features[2], net.features[5] = nn.GELU(), nn.GELU()
    return net


def pixels(count: int, seed: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter in the channel that the label names."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 160, (count, size, size, 3))
    images[np.arange(count), :, :, labels] += 60
    return images.astype(np.uint8), labels.astype(np.int64)


def small_data(count: int, seed: int) -> ImageDataset:
    images, labels = pixels(count, seed)
    return ImageDataset(images, labels, 12, CENTERED)


def write_npz(path: Path, train: int = 48, test: int = 24) -> Path:
    x_train, y_train = pixels(train, 0)
    x_test, y_test = pixels(test, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path
