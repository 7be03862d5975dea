"""Folders of images, one subfolder a class (the ImageFolder layout)."""

from __future__ import annotations

import io
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trady.errors import DataError, ResourceError
from trady.records.reading import read_bytes
from trady.records.translated import in_our_words
from trady.training.data.datasets import Pixels
from trady.training.data.source import DataFormat, OnUnreadable, RawData, RawSplit

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

TRAIN = ("train", "training")

EVALUATION = ("val", "valid", "validation", "test")

#: Larger images are taken for damage: decoding and converting this many pixels takes up to 0.8 GiB.
MOST_PIXELS = 2**26

#: The largest image file.
MOST_BYTES = 2**29

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
    train_split = _decode(_files(train or top, classes, skipped), image_size, on_unreadable, skipped)
    evaluation_split = None
    if evaluation is not None:
        foreign = sorted(set(_classes(evaluation)) - set(classes))
        if foreign:
            raise DataError(f"{evaluation} has classes that {train} has not: {', '.join(foreign)}")
        evaluation_split = _decode(_files(evaluation, classes, skipped), image_size, on_unreadable, skipped)
    return RawData(train_split, evaluation_split, classes, tuple(skipped))


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    if not classes:
        raise DataError(f"{folder} has no subfolders; expected one a class with its images in it")
    return classes


def _files(folder: Path, classes: tuple[str, ...], skipped: list[str]) -> list[tuple[Path, int]]:
    """Return the image files and their labels; pipes, devices and sockets, which never end, are skipped."""
    files = []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() not in SUFFIXES or path.name[0] == "." or path.is_dir():
                continue
            if path.exists() and not path.is_file():
                skipped.append(str(path))
            else:  # a link to nowhere is an image that cannot be read
                files.append((path, label))
    if not files:
        raise DataError(f"{folder} has {len(classes)} class folders but no image in them")
    return files


def _decode(
    files: list[tuple[Path, int]], image_size: int, on_unreadable: OnUnreadable, skipped: list[str]
) -> RawSplit:
    pixels = _empty((len(files), image_size, image_size, 3))
    labels: list[int] = []
    for path, label in files:
        try:
            pixels[len(labels)] = read_square(path, image_size)
        except UnreadableImageError as error:
            if on_unreadable == "refuse":
                raise DataError(f"{error}; mend or remove it, or skip such files with --on-unreadable skip") from error
            skipped.append(str(path))
            continue
        labels.append(label)
    return RawSplit(pixels[: len(labels)], np.asarray(labels, dtype=np.int64))


class UnreadableImageError(DataError):
    """A file that no image can be read from."""


def read_square(path: Path, size: int) -> Pixels:
    """Decode an image file: ``[size, size, 3]``, upright, in colours, cropped to its central square and resized.

    Raises:
        UnreadableImageError: No image can be read from it.
        DataError: Pillow is not installed.
        ResourceError: Disk or memory ran out.
    """
    Images = _pillow()  # noqa: N806
    try:
        # From memory: a decoder that is told to read 4 GiB of a file would take as much.
        content = io.BytesIO(read_bytes(path, MOST_BYTES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Images.DecompressionBombWarning)  # MOST_PIXELS says it in our words
            with Images.open(content) as image:
                return np.asarray(square(image, size))
    except Exception as error:  # whatever the decoder of a damaged file raises
        if isinstance(lack := in_our_words(error), ResourceError) and not isinstance(error, MemoryError):
            raise lack from error
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError('reading image files needs Pillow: pip install "trady[data]"') from None
    return Image


def square(image: Image, size: int) -> Image:
    """Return an image upright, in colours, cropped to its central square and resized; it is turned upright itself.

    Raises:
        ValueError: It has more pixels than are read.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"it says that it is {image.width} × {image.height} pixels large, and images of up to {MOST_PIXELS} pixels "
            "are read: make it smaller"
        )
    ImageOps.exif_transpose(image, in_place=True)
    colours = image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large image is a lot of memory
    return ImageOps.fit(colours, (size, size), Images.Resampling.BILINEAR)


def _empty(shape: tuple[int, ...]) -> Pixels:
    """Return an array for decoded images: in memory, or in an unnamed file if it is large."""
    if (size := math.prod(shape)) <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the content alive
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and would kill the process later
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


IMAGE_FOLDER = DataFormat("a folder of images", "photos/", matches, read)
