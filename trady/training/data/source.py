"""What every reader of a data set returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trady.training.data.datasets import Pixels

OnUnreadable = Literal["refuse", "skip"]


@dataclass(frozen=True)
class RawSplit:
    """Images ``[N, H, W]`` or ``[N, H, W, C]``, uint8, and their labels ``[N]``, not checked yet."""

    pixels: Pixels
    labels: npt.NDArray[Any]

    def take(self, index: npt.NDArray[np.int64]) -> RawSplit:
        """Return the images and labels at ``index``."""
        return RawSplit(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class RawData:
    """A source as it was found.

    Attributes:
        train: Images to train on, or all images.
        evaluation: Images to evaluate on; ``None`` where the source has no such part.
        classes: Names of the classes.
        skipped: Files that could not be read.
    """

    train: RawSplit
    evaluation: RawSplit | None
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
