"""Arrays out of a NumPy archive, once it is certain that they are what the archive says, and that memory is there.

A zip file may say that it holds more than it does, or hold a gigabyte in a kilobyte; a header of NumPy's may ask for an
array of any size. So every size is compared with the others, down to the bytes on disk, before memory is taken.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trady.errors import DataError, ResourceError
from trady.records.reading import check_regular
from trady.training.data.room import check_room

Array = npt.NDArray[Any]

#: What deflate can make of a byte, at most (zlib's own documentation: 1032 to 1).
_MOST_INFLATED = 1032

_END = ".npy"


class Archive:
    """An ``.npz`` file, open.

    Args:
        path: The file.

    Attributes:
        names: Of its arrays.

    Raises:
        DataError: It is no regular file, or no zip file whose parts are where it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        try:
            check_regular(path)
            self._bytes = path.stat().st_size
            self._file = path.open("rb")
            self._zip = zipfile.ZipFile(self._file)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except _DAMAGE as error:
            self._close()
            raise self._damaged(error) from error
        self._parts = {part.filename.removesuffix(_END): part for part in self._zip.infolist()}
        self.names = tuple(self._parts)
        if sum(part.compress_size for part in self._parts.values()) > self._bytes:
            self._close()
            raise self._damaged("its parts lie on top of each other, as in a zip bomb")

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def read(self, names: Iterable[str]) -> dict[str, Array]:
        """Return arrays by name.

        Raises:
            DataError: One is damaged, or is not as large as the archive says.
            ResourceError: Together they are larger than the memory that is left.
        """
        names = list(dict.fromkeys(names))
        try:
            needed = sum(self._checked_bytes(self._parts[name]) for name in names)
            check_room(needed, f"the arrays of {self.path}")
            found = {}
            for name in names:
                with self._zip.open(self._parts[name]) as part:
                    found[name] = np.lib.format.read_array(part, allow_pickle=False)
            return found
        except ResourceError:
            raise
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _checked_bytes(self, part: zipfile.ZipInfo) -> int:
        """Return what an array takes, if all that is said about its size fits together."""
        said, stored = part.file_size, part.compress_size
        if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{part.filename} is compressed in a way that NumPy never uses")
        most = stored if part.compress_type == zipfile.ZIP_STORED else _MOST_INFLATED * stored
        if said > most:
            raise ValueError(f"{part.filename} says that {stored} bytes hold {said}: it is cut short, or a zip bomb")
        with self._zip.open(part) as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError(f"{part.filename} is of version {version} of NumPy's format; 1.0 and 2.0 are read")
            shape, _, dtype = read_header[version](file)
            header = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{part.filename} holds Python objects, which are never read")
        array = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or array != said - header:
            raise ValueError(f"{part.filename} is to be {list(shape)} {dtype}, {array} bytes, and has {said - header}")
        return array

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _damaged(self, reason: object) -> DataError:
        return DataError(f"{self.path} cannot be read as .npz: {reason}; write it again with np.savez_compressed")


#: What zipfile, zlib and NumPy raise about a damaged file.
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, IndexError, KeyError, NotImplementedError, OSError, RecursionError,
    RuntimeError, SyntaxError, TypeError, ValueError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
