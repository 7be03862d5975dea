"""NumPy archives: images and labels as arrays, under the names people give them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.data.datasets import Pixels
from trady.training.data.source import DataFormat, OnUnreadable, RawData, RawSplit

Array = npt.NDArray[Any]

IMAGES = ("images", "image", "x", "data", "X")

LABELS = ("labels", "label", "y", "targets", "Y")

TRAIN = ("train", "training")

EVALUATION = ("test", "val", "valid", "validation", "evaluation", "eval")


def matches(name: str) -> bool:
    """Return whether ``name`` means an .npz file."""
    return name.endswith(".npz")


def read(name: str, image_size: int, on_unreadable: OnUnreadable) -> RawData:
    """Read images and labels; never anything pickled."""
    arrays = _load(Path(name))
    train = _find(arrays, TRAIN)
    evaluation = _find(arrays, EVALUATION)
    if train is None:
        train = _find(arrays, None)
    if train is None:
        shapes = ", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in arrays.items())
        raise DataError(
            f"{name} holds {shapes or 'no arrays'}; expected x_train, y_train, x_test, y_test "
            "(or train_images, train_labels, test_images, test_labels; or images, labels)"
        )
    splits = [_split(keys, arrays, name) for keys in (train, evaluation) if keys is not None]
    return RawData(
        splits[0], splits[1] if len(splits) > 1 else None, _classes(arrays, [s.labels for s in splits], name)
    )


def _load(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error


def _find(arrays: Mapping[str, Array], parts: Iterable[str] | None) -> tuple[str, str] | None:
    """Return the names of the images and labels of a split, whichever spelling the file uses."""

    def spellings(words: Iterable[str]) -> list[str]:
        if parts is None:
            return list(words)
        return [key for word in words for part in parts for key in (f"{word}_{part}", f"{part}_{word}")]

    images = next((key for key in spellings(IMAGES) if key in arrays), None)
    labels = next((key for key in spellings(LABELS) if key in arrays), None)
    return (images, labels) if images and labels else None


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


def _classes(arrays: Mapping[str, Array], labels: list[Array], name: str) -> tuple[str, ...]:
    for key in ("classes", "class_names", "label_names"):
        if key in arrays:
            return tuple(str(value) for value in arrays[key].tolist())
    found = np.concatenate(labels)
    if found.dtype.kind not in "iuf" or not len(found):
        if found.dtype.kind not in "iuf":
            raise DataError(f"{name}: labels are {found.dtype}; class indices must be whole numbers")
        return ()
    return tuple(str(index) for index in range(max(int(found.max()), 0) + 1))


NPZ = DataFormat("an .npz file", "data.npz", matches, read, lambda name: Path(name).is_file())
