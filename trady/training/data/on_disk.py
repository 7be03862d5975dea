"""Decoded images in a file instead of in memory: read image by image, so that none stays resident in the process."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trady.errors import DataError
from trady.training.data.datasets import Pixels

#: Images are written in pieces of about that many bytes.
_PIECE_BYTES = 4 << 20


class PixelsOnDisk:
    """Images of an array, in a file without a name: it is gone when nobody reads it any more, after a kill too.

    Indexed along its first axis, it gives what the array would.

    Args:
        pixels: ``[N, H, W]`` or ``[N, H, W, C]``, uint8.
        folder: Where the file lies.

    Raises:
        DataError: The file cannot be written.
    """

    def __init__(self, pixels: Pixels, folder: Path) -> None:
        self.shape, self.dtype, self.ndim = pixels.shape, pixels.dtype, pixels.ndim
        self._image_bytes = int(np.prod(pixels.shape[1:]))
        images = max(1, _PIECE_BYTES // max(self._image_bytes, 1))
        try:
            self._own(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            for start in range(0, len(pixels), images):
                self._file.write(np.ascontiguousarray(pixels[start : start + images]).data)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{pixels.nbytes} bytes of decoded images cannot be written to {folder}: {error}; make room there, or "
                "train on fewer or smaller images"
            ) from error

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Pixels:
        """Read the images at ``index``."""
        wanted = np.empty((len(index), *self.shape[1:]), dtype=np.uint8)
        for image, at in zip(wanted, index.tolist(), strict=True):
            if not -len(self) <= at < len(self):
                raise IndexError(f"image {at} of {len(self)}")
            # At a place of its own in the file: workers of a loader share the descriptor.
            read = os.preadv(self._file.fileno(), [image], (at % len(self)) * self._image_bytes)
            if read != self._image_bytes:
                raise DataError(f"the file of decoded images ends in image {at}: start the run again")
        return wanted

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker that is started afresh: the file, by the descriptor of the process that made it."""
        return {**self.__dict__, "_file": f"/proc/{os.getpid()}/fd/{self._file.fileno()}"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own(Path(state["_file"]).open("rb"))  # noqa: SIM115

    def _own(self, file: Any) -> None:
        self._file = file
        weakref.finalize(self, file.close)
