"""Folders of images, one subfolder a class (the ImageFolder layout)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from trady.errors import DataError
from trady.training.data.datasets import Pixels
from trady.training.data.source import DataFormat, OnUnreadable, RawData, RawSplit

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

TRAIN = ("train", "training")

EVALUATION = ("val", "valid", "validation", "test")

#: Decoded images that take more are kept in a temporary file instead of memory.
IN_MEMORY_BYTES = 2**30


def matches(name: str) -> bool:
    """Return whether ``name`` means a folder of images."""
    return Path(name).is_dir()


def read(name: str, image_size: int, on_unreadable: OnUnreadable) -> RawData:
    """Decode every image once, cropped to a square and resized to ``image_size``."""
    top = Path(name)
    train = next((top / part for part in TRAIN if (top / part).is_dir()), None)
    evaluation = next((top / part for part in EVALUATION if (top / part).is_dir()), None)
    if train is None and evaluation is not None:
        raise DataError(f"{top} has {evaluation.name}/ but no train/ beside it")
    classes = _classes(train or top)
    skipped: list[str] = []
    train_split = _decode(_files(train or top, classes), image_size, on_unreadable, skipped)
    evaluation_split = None
    if evaluation is not None:
        foreign = sorted(set(_classes(evaluation)) - set(classes))
        if foreign:
            raise DataError(f"{evaluation} has classes that {train} has not: {', '.join(foreign)}")
        evaluation_split = _decode(_files(evaluation, classes), image_size, on_unreadable, skipped)
    return RawData(train_split, evaluation_split, classes, tuple(skipped))


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"))
    if not classes:
        raise DataError(f"{folder} has no subfolders; expected one a class with its images in it")
    return classes


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.name[0] != "."
    ]
    if not files:
        raise DataError(f"{folder} has {len(classes)} class folders but no image in them")
    return files


def _decode(
    files: list[tuple[Path, int]], image_size: int, on_unreadable: OnUnreadable, skipped: list[str]
) -> RawSplit:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError('reading image files needs Pillow: pip install "trady[data]"') from None
    pixels = _empty((len(files), image_size, image_size, 3))
    labels: list[int] = []
    for path, label in files:
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                square = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if on_unreadable == "refuse":
                raise DataError(
                    f"{path} cannot be read as an image: {error}; "
                    "mend or remove it, or skip such files with --on-unreadable skip"
                ) from error
            skipped.append(str(path))
            continue
        pixels[len(labels)] = np.asarray(square)
        labels.append(label)
    return RawSplit(pixels[: len(labels)], np.asarray(labels, dtype=np.int64))


def _empty(shape: tuple[int, ...]) -> Pixels:
    """Return an array for decoded images: in memory, or in an unnamed file if it is large."""
    if int(np.prod(shape)) <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the content alive
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


IMAGE_FOLDER = DataFormat("a folder of images", "photos/", matches, read)
