"""Parts of a batch, one forward and backward pass each: less memory for the same update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from trady.errors import BudgetError
from trady.examine import tensors_of
from trady.trace import batch_size

#: The largest part of a batch that a budget is possible with: the whole batch, then halves of it.
AUTO = "auto"


def samples_at_once(example: Any, micro_batch: int | str) -> tuple[int, ...]:
    """List the sizes of a part that may be taken, the largest first.

    Args:
        example: A whole batch.
        micro_batch: Samples in a part, or :data:`AUTO`.

    Raises:
        BudgetError: It is none of these.

    """
    samples = batch_size(example)
    if micro_batch == AUTO:
        sizes = [samples]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        return tuple(sizes)
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise BudgetError(f"micro_batch={micro_batch!r} is neither a number of samples nor {AUTO!r}")
    return (min(micro_batch, samples),)


def part_of(batch: Any, start: int, samples: int) -> Any:
    """Take some samples of a batch: a view of every tensor that holds them."""
    whole = batch_size(batch)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != whole:
            return leaf
        return leaf[start : start + samples]

    return tree_map(part, dict(batch) if hasattr(batch, "keys") else batch)


def parts_of(batch: Any, samples: int | None) -> Iterator[tuple[Any, float]]:
    """Cut a batch; yield each part with its share of the samples.

    Args:
        batch: The inputs of the model, labels among them or not.
        samples: At most so many a part; ``None`` is the whole batch, as it is.

    """
    whole = 0 if samples is None else batch_size(batch)
    if samples is None or samples >= whole:
        yield batch, 1.0
        return
    for start in range(0, whole, samples):
        count = min(samples, whole - start)
        yield part_of(batch, start, count), count / whole


def waiting_bytes(batch: Any, part: Any) -> int:
    """Bytes of a batch that are there beside the part that the model works on."""
    return sum(t.nbytes for t in tensors_of(batch)) - sum(t.nbytes for t in tensors_of(part))
