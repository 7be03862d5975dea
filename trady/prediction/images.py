"""Images as a run takes them: decoded, cropped, resized and normalised by the code that training reads them with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trady.errors import DataError
from trady.prediction.files import files_in
from trady.prediction.predictor import Predictor
from trady.training.data.datasets import ImageDataset, Pixels
from trady.training.data.image_files import UnreadableImageError, read_square, square


class ImagePredictor(Predictor):
    """A run on images.

    An image is a path (of a folder: all images in it), an image of Pillow, or an array (uint8) ``[H, W]``,
    ``[H, W, 1]`` or ``[H, W, 3]``.
    Photographs are turned upright, cropped to their central square and resized; arrays are resized as they are, like
    those of a ``.npz`` file.
    """

    def preprocess(self, source: Any) -> Tensor:
        """Return an image as the model takes it: ``[3, size, size]``, float32, normalised.

        Raises:
            DataError: It cannot be read, or is no image.
        """
        images = self.description.images
        assert images is not None
        pixels = self._pixels(source, images.size)
        data = ImageDataset(pixels[None], np.zeros(1, dtype=np.int64), images.size, images.normalization)
        return data.batch([0])[0][0]

    def _pixels(self, source: Any, size: int) -> Pixels:
        if isinstance(source, (str, os.PathLike)):
            return read_square(Path(source), size)
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (1, 3))):
                raise DataError(
                    f"an array of {source.dtype} {list(source.shape)} is no image; expected uint8 [H, W], [H, W, 1] or "
                    "[H, W, 3], pixels from 0 to 255"
                )
            if not source.size:
                raise DataError(f"an array {list(source.shape)} has no pixels")
            return source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source
        if hasattr(source, "getexif") and hasattr(source, "convert"):
            try:
                return np.asarray(square(source.copy(), size))
            except Exception as error:  # an image of Pillow is decoded when it is looked at
                raise UnreadableImageError(f"the image cannot be read: {error}") from error
        raise DataError(
            f"a {type(source).__name__} is no image; give a path, an image of Pillow, or an array of uint8. A tensor "
            "that is prepared goes to .model or .scores"
        )

    def _many(self, inputs: Any) -> Iterable[Any]:
        if isinstance(inputs, np.ndarray):  # one image, or several along the first axis
            several = inputs.ndim == 4 or (inputs.ndim == 3 and inputs.shape[2] not in (1, 3))
            return inputs if several else [inputs]
        if isinstance(inputs, (str, os.PathLike)) and Path(inputs).is_dir():
            return files_in(Path(inputs))
        one = isinstance(inputs, (str, os.PathLike)) or hasattr(inputs, "getexif") or not hasattr(inputs, "__iter__")
        found: Sequence[Any] | Iterable[Any] = [inputs] if one else inputs
        return found
