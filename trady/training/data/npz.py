"""NumPy archives: images and labels as arrays, under the names people give them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.data.archive import Archive
from trady.training.data.datasets import Pixels
from trady.training.data.source import DataFormat, RawData, RawSplit, Reading

Array = npt.NDArray[Any]

IMAGES = ("images", "image", "x", "data", "X")

LABELS = ("labels", "label", "y", "targets", "Y")

TRAIN = ("train", "training")

CLASSES = ("classes", "class_names", "label_names")

#: Labels may run to this many times the number of classes that occur; a head has a row for every one in between.
MOST_GAP = 10

EVALUATION = ("test", "val", "valid", "validation", "evaluation", "eval")


def matches(name: str) -> bool:
    """Return whether ``name`` means an .npz file."""
    return name.endswith(".npz")


def read(name: str, reading: Reading) -> RawData:
    """Read images and labels; never anything pickled, and nothing that is not needed."""
    with Archive(Path(name)) as archive:
        train = _find(archive.names, TRAIN)
        evaluation = _find(archive.names, EVALUATION)
        if train is None:
            train = _find(archive.names, None)
        if train is None:
            raise DataError(
                f"{name} holds {', '.join(archive.names) or 'no arrays'}; expected x_train, y_train, x_test, y_test "
                "(or train_images, train_labels, test_images, test_labels; or images, labels)"
            )
        found = [keys for keys in (train, evaluation) if keys is not None]
        named = next((key for key in CLASSES if key in archive.names), None)
        arrays = archive.read([key for keys in found for key in keys] + ([] if named is None else [named]))
    splits = [_split(keys, arrays, name) for keys in found]
    classes = _classes([s.labels for s in splits], name) if named is None else _names(arrays[named], named, name)
    return RawData(splits[0], splits[1] if len(splits) > 1 else None, classes)


def read_unlabelled(name: str) -> Pixels | None:
    """Return the images of a file that has no labels; ``None`` where it has some, or no images either."""
    with Archive(Path(name)) as archive:
        labelled = any(_find(archive.names, parts) for parts in (TRAIN, EVALUATION, None))
        key = next((key for key in (*IMAGES, *_spellings(IMAGES, EVALUATION)) if key in archive.names), None)
        if labelled or key is None:
            return None
        return _pixels(archive.read([key])[key], key, name)


def _find(names: Collection[str], parts: Iterable[str] | None) -> tuple[str, str] | None:
    """Return the names of the images and labels of a split, whichever spelling the file uses."""
    images = next((key for key in _spellings(IMAGES, parts) if key in names), None)
    labels = next((key for key in _spellings(LABELS, parts) if key in names), None)
    return (images, labels) if images and labels else None


def _spellings(words: Iterable[str], parts: Iterable[str] | None) -> list[str]:
    if parts is None:
        return list(words)
    return [key for word in words for part in parts for key in (f"{word}_{part}", f"{part}_{word}")]


def _split(keys: tuple[str, str], arrays: Mapping[str, Array], name: str) -> RawSplit:
    images, labels = (arrays[key] for key in keys)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or images.ndim == 0 or len(images) != len(labels):
        raise DataError(
            f"{name}: {keys[0]} is {list(images.shape)} and {keys[1]} is {list(labels.shape)}; "
            "there must be one label for each image"
        )
    return RawSplit(_pixels(images, keys[0], name), labels)


def _pixels(images: Array, key: str, name: str) -> Pixels:
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise DataError(
            f"{name}: {key} is {list(images.shape)}; expected [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W]"
        )
    if 0 in images.shape[1:]:
        raise DataError(f"{name}: {key} is {list(images.shape)}; the images have no pixels")
    if images.dtype != np.uint8:
        in_range = images.dtype.kind in "iu" and (not images.size or (images.min() >= 0 and images.max() <= 255))
        if not in_range:
            raise DataError(f"{name}: {key} is {images.dtype}; expected uint8 pixels from 0 to 255")
        images = images.astype(np.uint8)
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def _names(array: Array, key: str, name: str) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind not in "USiu":
        raise DataError(f"{name}: {key} is {array.dtype} {list(array.shape)}; expected one name a class")
    try:
        values = array.tolist()
    except (SystemError, ValueError) as error:
        raise DataError(f"{name}: {key} holds what is no text: {error}") from error
    return tuple(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values)


def _classes(labels: list[Array], name: str) -> tuple[str, ...]:
    """Return a name for every class, its number, where the file has no names."""
    for each in labels:
        if each.dtype.kind not in "iuf":
            raise DataError(f"{name}: labels are {each.dtype}; class indices must be whole numbers")
    found = np.unique(np.concatenate(labels))
    if not len(found):
        return ()
    if not np.isfinite(found).all():
        raise DataError(f"{name}: labels are not all finite; class indices must be whole numbers")
    count = max(int(found[-1]), 0) + 1
    if count > MOST_GAP * len(found):
        raise DataError(
            f"{name}: the largest label is {count - 1}, but only {len(found)} classes occur ({_some(found)}); a head "
            f"for {count} classes would mostly stand empty. Number the classes from 0 (np.unique(labels, "
            "return_inverse=True)[1]), or add an array named classes with a name for each"
        )
    return tuple(map(str, range(count)))


def _some(values: Array) -> str:
    shown = [f"{value:g}" for value in values[:5].tolist()]
    return ", ".join(shown) + (", …" if len(values) > 5 else "")


NPZ = DataFormat("an .npz file", "data.npz", matches, read, lambda name: Path(name).is_file())
