"""What a data format is, what its reader returns, and the registry of formats.

A format is one file beside this one and one registration in the package's ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.data.datasets import Pixels

OnUnreadable = Literal["refuse", "skip"]

#: Told how many files are read, of how many.
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        image_size: What images will be resized to; they may come at any size.
        on_unreadable: What becomes of a file that cannot be read.
        progress: Told how far it is.
        keep: A folder where decoded images may be kept, to be found when the same source is read again.
    """

    image_size: int
    on_unreadable: OnUnreadable = "refuse"
    progress: Progress = lambda done, count: None
    keep: Path | None = None


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
        evaluation: Images to evaluate on; ``None`` where the source does not set any apart.
        classes: Names of the classes.
        skipped: Files that could not be read.
        ignored: How many other files lie there, by what they are.
    """

    train: RawSplit
    evaluation: RawSplit | None
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFormat:
    """One kind of data set.

    Attributes:
        kind: What it is, for people: ``an .npz file``.
        example: How one is named: ``data.npz``.
        matches: Whether a source is meant to be of this kind; it need not exist.
        read: Reads a source. What it needs beyond NumPy is imported inside.
        exists: Whether a source that matches is there, as far as one can say without reading it.
        by_name: Whether a source is a name of its own, and no path.
    """

    kind: str
    example: str
    matches: Callable[[str], bool]
    read: Callable[[str, Reading], RawData]
    exists: Callable[[str], bool] = lambda source: True
    by_name: bool = False


_formats: list[DataFormat] = []


def register_data_format(data_format: DataFormat) -> None:
    """Have :func:`trady.load_data` read this kind of data set as well; kinds that were registered before go first."""
    _formats.append(data_format)


def format_of(source: str) -> DataFormat:
    """Return the format of a source.

    Raises:
        DataError: It is of none; the message lists all that there are.
    """
    if (found := next((data_format for data_format in _formats if data_format.matches(source)), None)) is not None:
        return found
    known = "; ".join(f"{data_format.kind} ({data_format.example})" for data_format in _formats)
    what = "is not a data set that trady reads" if Path(source).exists() else "does not exist"
    raise DataError(f"{source} {what}; it reads {known}")


def is_name(source: str) -> bool:
    """Return whether a source is the name of a data set, and no path."""
    return any(data_format.by_name and data_format.matches(source) for data_format in _formats)
