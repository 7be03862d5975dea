"""Reading a data set: one function for every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.data import fashion_mnist, npz
from trady.training.data import image_folder as folder
from trady.training.data.datasets import CENTERED, DataSplit, ImageDataset, Labels, Normalization, epoch_order
from trady.training.data.source import OnUnreadable, RawData, RawSplit

__all__ = ["DataSplit", "load_data", "train_and_evaluation"]

#: Share of the images that evaluation gets where a source has no part of its own for it.
EVALUATION_SHARE = 0.2

Reader = Callable[[str, int, OnUnreadable], RawData]


@dataclass(frozen=True)
class Source:
    """A kind of data set: when it is meant, and how it is read."""

    kind: str
    example: str
    matches: Callable[[str], bool]
    read: Reader


SOURCES: list[Source] = [
    Source("Fashion-MNIST", "fashion-mnist", fashion_mnist.matches, fashion_mnist.read),
    Source("an .npz file", "data.npz", npz.matches, npz.read),
    Source("a folder of images", "photos/", folder.matches, folder.read),
]


def load_data(
    source: str | Path,
    *,
    image_size: int,
    split: Literal["both", "train", "evaluation"] = "both",
    limit: int | tuple[int | None, int | None] | None = None,
    normalization: Normalization = CENTERED,
    on_unreadable: OnUnreadable = "refuse",
    seed: int = 0,
) -> DataSplit:
    """Read a data set of labelled images.

    Args:
        source: ``fashion-mnist``; a ``.npz`` file with ``x_train``, ``y_train``, ``x_test``,
            ``y_test`` (or ``train_images``, …; see docs/cli.md); or a folder with one subfolder a
            class, below ``train/`` and ``val/`` or at the top.
        image_size: Height and width that the images are resized to.
        split: Which part must be there; a part that is not asked for may be empty.
        limit: At most so many images, drawn with ``seed``, for training and for evaluation each,
            or as a pair.
        normalization: Applied to the pixels of each batch.
        on_unreadable: ``refuse`` an image file that cannot be read, or ``skip`` and count it.
        seed: Decides which images a limit keeps, and the split where the source has none.

    Returns:
        The images for training and evaluation, and the names of the classes.

    Raises:
        DataError: The source cannot be read, or its images and labels do not fit together.
    """
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; it must be at least 1")
    if on_unreadable not in ("refuse", "skip"):
        raise DataError(f"on_unreadable is {on_unreadable!r}; give 'refuse' or 'skip'")
    name = str(source)
    raw = _reader(name)(name, image_size, on_unreadable)
    train, evaluation = train_and_evaluation(raw, seed, name)
    if split != "evaluation" and not len(train.labels):
        raise DataError(f"{name} has no images to train on")
    if split != "train" and not len(evaluation.labels):
        raise DataError(f"{name} has no images to evaluate on")
    limits = limit if isinstance(limit, tuple) else (limit, limit)
    for value in limits:
        if value is not None and value < 1:
            raise DataError(f"limit is {value}; it must be at least 1")
    parts = [
        ImageDataset(part.pixels, check_labels(part.labels, raw.classes, name), image_size, normalization)
        for part in (train, evaluation)
    ]
    return DataSplit(parts[0].head(limits[0], seed), parts[1].head(limits[1], seed), raw.classes, raw.skipped)


def check_source(source: str | Path) -> None:
    """Refuse what :func:`load_data` could not read at all, without reading it.

    Raises:
        DataError: There is no such source, or it is of no known kind.
    """
    name = str(source)
    _reader(name)
    if npz.matches(name) and not Path(name).is_file():
        raise DataError(f"{name} does not exist")


def _reader(name: str) -> Reader:
    for source in SOURCES:
        if source.matches(name):
            return source.read
    known = "; ".join(f"{source.kind} ({source.example})" for source in SOURCES)
    path = Path(name)
    what = "is not a data set that trady reads" if path.exists() else "does not exist"
    raise DataError(f"{name} {what}; it reads {known}")


def train_and_evaluation(raw: RawData, seed: int, name: str) -> tuple[RawSplit, RawSplit]:
    """Return the source's own two parts; where it has one only, share it out with ``seed``."""
    if raw.evaluation is not None:
        return raw.train, raw.evaluation
    count = len(raw.train.labels)
    if count < 2:
        raise DataError(f"{name} has {count} images; at least two are needed to train and to evaluate")
    order = epoch_order(count, seed, 0).numpy()
    cut = max(1, round(count * EVALUATION_SHARE))
    held_out, kept = np.sort(order[:cut]), np.sort(order[cut:])
    return raw.train.take(kept), raw.train.take(held_out)


def check_labels(labels: npt.NDArray[np.generic], classes: tuple[str, ...], name: str) -> Labels:
    """Return the labels as int64, each an index into ``classes``; refuse any other."""
    if labels.dtype.kind not in "iu":
        whole = labels.dtype.kind == "f" and bool(np.all(np.mod(labels, 1) == 0))
        if not whole:
            raise DataError(f"{name}: labels are {labels.dtype}; class indices must be whole numbers")
    integers = labels.astype(np.int64)
    if len(integers) and (integers.min() < 0 or integers.max() >= len(classes)):
        raise DataError(
            f"{name}: labels run from {integers.min()} to {integers.max()}, "
            f"but there are {len(classes)} classes: 0 to {len(classes) - 1} are possible"
        )
    return integers
