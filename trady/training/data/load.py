"""Reading a data set: one function for every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.records.translated import file_errors
from trady.training.data.datasets import CENTERED, DataSplit, ImageDataset, Labels, Normalization
from trady.training.data.source import OnUnreadable, Progress, RawData, RawSplit, Reading, format_of
from trady.training.data.stratified import stratified

__all__ = ["DataSplit", "load_data", "train_and_evaluation"]

#: Share of the images that evaluation gets where a source does not set any apart.
EVALUATION_SHARE = 0.2


def load_data(
    source: str | Path,
    *,
    image_size: int,
    split: Literal["both", "train", "evaluation"] = "both",
    limit: int | tuple[int | None, int | None] | None = None,
    normalization: Normalization = CENTERED,
    on_unreadable: OnUnreadable = "refuse",
    seed: int = 0,
    progress: Progress | None = None,
    keep: str | Path | None = None,
) -> DataSplit:
    """Read a data set of labelled images.

    Args:
        source: ``fashion-mnist``; a ``.npz`` file with ``x_train``, ``y_train``, ``x_test``,
            ``y_test`` (or ``train_images``, …; see docs/cli.md); or a folder with one subfolder a
            class, below ``train/`` and ``val/`` or at the top.
        image_size: Height and width that the images are resized to.
        split: Which of the two must be there; the other may be empty.
        limit: Maximum number of images, drawn with ``seed``: one for training and for evaluation each, or a pair.
        normalization: Applied to the pixels of each batch.
        on_unreadable: ``refuse`` an image file that cannot be read, or ``skip`` and count it.
        seed: Decides which images a limit keeps, and the split where the source has none: a fifth of each class.
        progress: Told how many image files are decoded, of how many.
        keep: A folder where decoded images are kept if that took long, to be found when they are read again.

    Returns:
        The images for training and evaluation, and the names of the classes.

    Raises:
        DataError: The source cannot be read, or its images and labels do not fit together.
        ResourceError: There is no memory, or no space on the disk, for its images.
    """
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; it must be at least 1")
    if on_unreadable not in ("refuse", "skip"):
        raise DataError(f"on_unreadable is {on_unreadable!r}; give 'refuse' or 'skip'")
    name = str(source)
    with file_errors():
        told = Reading(image_size, on_unreadable, keep=None if keep is None else Path(keep))
        raw = format_of(name).read(name, told if progress is None else replace(told, progress=progress))
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
        ImageDataset(part.pixels, check_labels(part.labels, raw.classes, name), image_size, normalization, raw.classes)
        for part in (train, evaluation)
    ]
    kept = [part.head(limit, seed) for part, limit in zip(parts, limits, strict=True)]
    return DataSplit(
        kept[0], kept[1], raw.classes, raw.skipped, raw.ignored, (len(parts[0]), len(parts[1])), raw.evaluation is None
    )


def check_source(source: str | Path) -> None:
    """Refuse what :func:`load_data` could not read at all, without reading it.

    Raises:
        DataError: There is no such source, or it is of no known kind.
    """
    name = str(source)
    if not format_of(name).exists(name):
        raise DataError(f"{name} does not exist")


def check_examples(data: DataSplit, source: str) -> None:
    """Refuse to train on fewer images than there are classes.

    Raises:
        DataError: There are fewer; the message says how many.
    """
    images, classes = len(data.train), len(data.classes)
    if images < classes:
        raise DataError(
            f"{source} has {images} images to train on and {classes} classes: train on at least one image a class "
            "(a larger --limit, or train_limit in a matrix)"
        )


def train_and_evaluation(raw: RawData, seed: int, name: str) -> tuple[RawSplit, RawSplit]:
    """Return the images to train and to evaluate on; of a source that sets none apart, a fifth of each class."""
    if raw.evaluation is not None:
        return raw.train, raw.evaluation
    count = len(raw.train.labels)
    if count < 2:
        raise DataError(f"{name} has {count} images; at least two are needed to train and to evaluate")
    kept, held_out = stratified(raw.train.labels, EVALUATION_SHARE, seed)
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
