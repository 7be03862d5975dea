"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747): 70 000 grey images in ten classes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from trady.errors import DataError
from trady.records.reading import check_regular
from trady.training.data.datasets import Pixels
from trady.training.data.no_code import no_code
from trady.training.data.source import DataFormat, RawData, RawSplit, Reading

#: Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

#: More than its largest file holds, 47 040 016.
_MOST_BYTES = 64 << 20
#: Files are unpacked in pieces of that size.
_PIECE_BYTES = 1 << 20

HUB_NAME = "zalando-datasets/fashion_mnist"

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def matches(name: str) -> bool:
    """Return whether ``name`` means Fashion-MNIST."""
    return name.lower().replace("_", "-") in ("fashion-mnist", HUB_NAME.replace("_", "-"))


def read(name: str, reading: Reading) -> RawData:
    """Read Debian's files where they are installed, the Hub's data set otherwise."""
    if DEBIAN_FOLDER.is_dir():
        return RawData(_idx_split("train"), _idx_split("t10k"), CLASSES)
    return RawData(_hub_split("train"), _hub_split("test"), CLASSES)


def _idx_split(split: str) -> RawSplit:
    images = read_idx(DEBIAN_FOLDER / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(DEBIAN_FOLDER / f"{split}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{DEBIAN_FOLDER}: {split} has images {images.shape} and labels {labels.shape}")
    return RawSplit(images, labels)


def read_idx(path: Path) -> Pixels:
    """Read a gzipped IDX file of bytes: two zeros, type 8, the number of axes, their lengths, the data."""
    content = bytearray()
    try:
        check_regular(path)
        with gzip.open(path) as file:  # in pieces, so that neither file nor data is in memory twice
            while len(content) <= _MOST_BYTES and (piece := file.read(_PIECE_BYTES)):
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) > _MOST_BYTES:
        raise DataError(f"{path} holds more than {_MOST_BYTES} bytes; it is no file of Fashion-MNIST")
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    axes = content[3]
    if len(content) < 4 + 4 * axes:
        raise DataError(f"{path} ends within its header")
    shape = tuple(np.frombuffer(content, ">u4", count=axes, offset=4).tolist())
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if len(data) != math.prod(shape) or not 1 <= axes <= 3:
        raise DataError(f"{path} holds {len(data)} bytes, its header says {' × '.join(map(str, shape)) or 'nothing'}")
    return data.reshape(shape)


def _hub_split(split: str) -> RawSplit:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "Fashion-MNIST is not on this machine; install it with 'sudo apt-get install "
            "dataset-fashion-mnist', or 'pip install \"trady[data]\"' to take it from the Hugging Face Hub"
        ) from None
    try:
        rows = datasets.load_dataset(HUB_NAME, split=split, **no_code(datasets.load_dataset)).with_format("numpy")
        return RawSplit(np.stack(list(rows["image"])).astype(np.uint8), np.asarray(rows["label"]))
    except Exception as error:  # whatever the Hub, the network or the cache answers
        raise DataError(
            f"{HUB_NAME} could not be read from the Hugging Face Hub ({error}); "
            "on Debian and Ubuntu: sudo apt-get install dataset-fashion-mnist"
        ) from error


FASHION_MNIST = DataFormat("Fashion-MNIST", "fashion-mnist", matches, read, by_name=True)
