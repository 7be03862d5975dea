"""What a data set is, in values that can be compared: a run that is resumed must have the data it was started with.

Of images that :func:`trady.load_data` has read, and of tensors, that is their content. Of a data set of somebody's own
it is what can be known without reading it: its type, its length, and its classes and targets where it has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from trady.training.data.augment import as_it_is
from trady.training.data.datasets import ImageDataset
from trady.training.texts.dataset import Ragged, TextDataset

#: Of more content than this, evenly spaced examples of this size together are looked at.
CONTENT_BYTES = 2**28

#: Floating-point types that NumPy has; the others are compared as integers.
_OF_NUMPY = {torch.float16, torch.float32, torch.float64}
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Names under which data sets keep the classes of all examples.
_TARGETS = ("targets", "labels")


def identity(train: Any, evaluation: Any) -> dict[str, Any]:
    """Return what the data of a run is, JSON-able, with keys that people understand.

    Args:
        train: A data set, or a loader of one.
        evaluation: The same.
    """
    parts = (("training", train), ("evaluation", evaluation))
    return {f"{part} {key}": value for part, data in parts for key, value in _facts(data).items()}


def _facts(data: Any) -> dict[str, Any]:
    data = as_it_is(data.dataset if isinstance(data, DataLoader) else data)
    if isinstance(data, ImageDataset):
        return {
            "examples": len(data),
            "image size": data.image_size,
            "classes": readable_names(data.classes),
            "normalization": f"mean {list(data.normalization.mean)}, std {list(data.normalization.std)}",
            "labels": _digest([data.labels]),
            "pixels": _digest([data.pixels]),
        }
    if isinstance(data, TextDataset):
        labels = data.labels
        return {
            "examples": len(data),
            "longest": data.longest,
            "classes": readable_names(data.classes),
            "tokens": _digest([part for column in data.columns.values() for part in (column.flat, column.starts)]),
            "labels": _digest([labels.flat, labels.starts] if isinstance(labels, Ragged) else [labels]),
        }
    facts = {"type": type(data).__name__, "examples": _length(data)}
    if isinstance(data, TensorDataset):
        return {**facts, "tensors": _digest([_array(tensor) for tensor in data.tensors])}
    if isinstance(data, Subset):
        chosen = np.asarray(list(data.indices), dtype=np.int64)
        return {**facts, "indices": _digest([chosen]), **_below("whole", data.dataset)}
    if isinstance(data, ConcatDataset):
        parts = enumerate(data.datasets, start=1)
        return {
            **facts,
            **{key: value for number, part in parts for key, value in _below(f"part {number}", part).items()},
        }
    return {**facts, **_told(data)}


def _below(name: str, data: Any) -> dict[str, Any]:
    return {f"{name}: {key}": value for key, value in _facts(data).items()}


def _told(data: Any) -> dict[str, Any]:
    """What a data set says of itself, in the words that torchvision's and most others have."""
    found: dict[str, Any] = {}
    classes = _attribute(data, "classes")
    if (
        isinstance(classes, Sequence)
        and not isinstance(classes, str)
        and all(isinstance(name, str) for name in classes)
    ):
        found["classes"] = readable_names(classes)
    columns = _attribute(data, "column_names")
    if isinstance(columns, Sequence) and all(isinstance(name, str) for name in columns):
        found["columns"] = readable_names(columns)
    for name in _TARGETS:
        targets = _attribute(data, name)
        if isinstance(targets, (list, tuple, np.ndarray, torch.Tensor)):
            array = _array(targets)
            if array.ndim == 1 and array.dtype.kind in "iu":
                found[name] = _digest([array.astype(np.int64)])
    return found


def readable_names(names: Sequence[str]) -> list[str]:
    """Names as they can be read again: those of folders need not be UTF-8."""
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def _length(data: Any) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except Exception:  # somebody's own code
        return None


def _attribute(data: Any, name: str) -> Any:
    try:
        return getattr(data, name, None)
    except Exception:  # a property of somebody's own
        return None


def _array(values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.to_dense() if values.layout != torch.strided else values
        if values.dtype not in _OF_NUMPY and values.element_size() in _AS_INTEGERS:
            values = values.view(_AS_INTEGERS[values.element_size()])
        values = values.numpy()
    array: np.ndarray[Any, Any] = np.asarray(values)
    return array


def _digest(arrays: Sequence[np.ndarray[Any, Any]]) -> str:
    """Return sixteen digits that name these arrays: shapes, types and contents."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.shape} {array.dtype.str}\n".encode())
        for part in _content(array):
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]


def _content(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield an array in parts of some MiB; of a very large one, evenly spaced examples."""
    if not array.size:
        return
    if not array.ndim:
        array = np.atleast_1d(array)
    step = -(-array.nbytes // CONTENT_BYTES)
    at_once = max(1, 2**22 * len(array) // array.nbytes)
    for start in range(0, len(array), at_once * step):
        yield array[start : start + at_once * step : step]
