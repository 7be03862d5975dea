"""One image file as pixels: which files are images, and how one is decoded, turned upright, cropped and resized."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trady.errors import DataError, ResourceError
from trady.records.reading import read_bytes
from trady.records.translated import in_our_words
from trady.training.data.datasets import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

#: Endings of images that every Pillow reads.
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

#: Endings that Pillow reads with a plug-in, and the package that has it.
WITH_PLUGIN = {".avif": "pillow-avif-plugin", ".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif"}

#: Larger images are taken for damage: decoding and converting this many pixels takes up to 0.8 GiB.
MOST_PIXELS = 2**26

#: Kinds of other files that a message names.
_SHOWN = 5

#: The largest image file.
MOST_BYTES = 2**29

#: A JPEG is decoded at an eighth, a quarter or half of its size where that is this many times what is wanted, or more.
_DRAFT = 2


class UnreadableImageError(DataError):
    """A file that no image can be read from."""


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the endings of images that are read here: those of Pillow and of the plug-ins that are installed."""
    found = set(SUFFIXES)
    if find_spec("PIL") is None:
        return SUFFIXES
    from PIL import features

    if features.check("avif") if "avif" in features.modules else _registered("pillow_avif"):
        found.add(".avif")
    if _registered("pillow_heif", "register_heif_opener"):
        found |= {".heic", ".heif", ".hif"}
    return frozenset(found)


def ending_of(path: Path) -> str:
    """Return what a file's name ends in, for people."""
    return path.suffix.lower() or "without an ending"


def as_counted(endings: Counter[str]) -> str:
    """Return which other files there are, in a text."""
    return ", ".join(f"{count} {kind}" for kind, count in list(named(endings).items())[:_SHOWN])


def named(endings: Counter[str]) -> dict[str, int]:
    """Return them, the most frequent first, each image with the package that reads it."""
    install = {ending: f" (read with pip install {package})" for ending, package in WITH_PLUGIN.items()}
    return {ending + install.get(ending, ""): count for ending, count in endings.most_common()}


def _registered(module: str, function: str | None = None) -> bool:
    """Import a plug-in of Pillow, and register it where importing it does not."""
    if find_spec(module) is None:
        return False
    from importlib import import_module

    try:
        plugin = import_module(module)
        if function is not None:
            getattr(plugin, function)()
    except Exception:  # of another version, or its library is not there
        return False
    return True


def read_square(path: Path, size: int) -> Pixels:
    """Decode an image file: ``[size, size, 3]``, upright, in colours, cropped to its central square and resized.

    Raises:
        UnreadableImageError: No image can be read from it.
        DataError: Pillow is not installed.
        ResourceError: Disk or memory ran out.
    """
    with bombs_ignored():
        return decode_square(path, size)


@contextmanager
def bombs_ignored() -> Iterator[None]:
    """Context in which Pillow does not warn of large images, which :data:`MOST_PIXELS` refuses in our words.

    What is ignored is ignored in all threads, and put back when the context ends.
    """
    Images = _pillow()  # noqa: N806
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Images.DecompressionBombWarning)
        yield


def decode_square(
    path: Path, size: int, room: Callable[[int], AbstractContextManager[object]] = lambda pixels: nullcontext()
) -> Pixels:
    """Do what :func:`read_square` does, inside of :func:`bombs_ignored`: it may run in several threads.

    Args:
        path: The file.
        size: Height and width of the result.
        room: Makes the context in which that many pixels are decoded.
    """
    Images = _pillow()  # noqa: N806
    readable_suffixes()  # registers plug-ins
    try:
        # From memory: a decoder that is told to read 4 GiB of a file would take as much.
        with Images.open(io.BytesIO(read_bytes(path, MOST_BYTES))) as image:
            _draft(image, size)
            with room(image.width * image.height):
                return np.asarray(square(image, size))
    except Exception as error:  # whatever the decoder of a damaged file raises
        if isinstance(lack := in_our_words(error), ResourceError) and not isinstance(error, MemoryError):
            raise lack from error
        # Pillow names the object that it was given, not the file.
        unknown = type(error).__name__ == "UnidentifiedImageError"
        reason = "it is damaged, or of no kind that Pillow knows" if unknown else error
        raise UnreadableImageError(f"{path} cannot be read as an image: {reason}") from error


def square(image: Image, size: int) -> Image:
    """Return an image upright, in colours, cropped to its central square and resized; it is turned upright itself.

    A large JPEG that is not decoded yet is decoded smaller, which takes a fraction of the time and the memory.

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
    _draft(image, size)
    ImageOps.exif_transpose(image, in_place=True)
    colours = image if image.mode == "RGB" else _in_colours(image)  # a copy of a large image is a lot of memory
    return ImageOps.fit(colours, (size, size), Images.Resampling.BILINEAR)


def _draft(image: Image, size: int) -> None:
    """Have a JPEG decoded smaller; other formats, and images that are decoded, stay as they are."""
    image.draft("RGB", (_DRAFT * size, _DRAFT * size))


def _in_colours(image: Image) -> Image:
    """Convert to RGB; grey of more than 8 bits is scaled to them, where Pillow would cut it off at 255."""
    from PIL import Image as Images

    if not (image.mode.startswith("I") or image.mode == "F"):
        return image.convert("RGB")
    values = np.asarray(image, dtype=np.float32)
    largest = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or (image.mode == "I" and largest > 255):
        # Files of 16 bits are opened as I too, and others have their own range.
        values = values * (255.0 / 65535.0 if largest <= 65535 else 255.0 / largest)
    elif image.mode == "F" and largest <= 1.0:
        values = values * 255.0
    return Images.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError('reading image files needs Pillow: pip install "trady[data]"') from None
    return Image
