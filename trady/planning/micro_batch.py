"""Parts of a batch, one forward and backward pass each: less memory for the same update."""

from __future__ import annotations

from typing import Any

from trady.errors import BudgetError
from trady.model.batch import batch_size

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
