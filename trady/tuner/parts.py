"""A batch in parts: one forward and backward pass each, whose weighted gradients add up to those of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from trady.model.batch import Batch


def parts_of(whole: tuple[Any, ...], samples: int | None) -> Iterator[tuple[Any, ...]]:
    """Cut what belongs to a batch along its samples.

    Args:
        whole: What is cut; the first tensor says how many samples there are.
        samples: Up to this many a part; ``None`` is the batch as it is.

    Yields:
        A part of each, and the part's share of the samples.

    """
    if samples is None:
        yield (*whole, 1.0)
        return
    given = tuple(dict(each) if hasattr(each, "keys") else each for each in whole)
    for chunk, share in Batch(given).chunks(samples):
        yield (*(whole if share == 1.0 else chunk.inputs), share)


def of_batch_statistics(model: nn.Module) -> str | None:
    """Name a normalisation that uses the statistics of the batch itself: a part has others than the whole batch."""
    kind = nn.modules.batchnorm._BatchNorm
    found = (name for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is None)
    return next(found, None)
