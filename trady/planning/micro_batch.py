"""Chunks of a batch, one forward and backward pass each: less memory for the same update."""

from __future__ import annotations

from trady.errors import BudgetError
from trady.model.batch import Batch

#: The largest chunk of a batch that a budget is possible with: the full batch, then halves of it.
AUTO = "auto"

#: The largest chunk with which nearly as much trains as with any: a smaller chunk leaves more of a peak to channels.
MOST = "most"

#: What counts as nearly: this share of the weights that would train.
ENOUGH = 0.95

WORDS = (AUTO, MOST)


def check_micro_batch(micro_batch: object) -> None:
    """Refuse what is no size of a chunk.

    Raises:
        BudgetError: It is neither a number of samples, nor one of :data:`WORDS`, nor ``None``.

    """
    if micro_batch is None or (isinstance(micro_batch, str) and micro_batch in WORDS):
        return
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise BudgetError(f"micro_batch={micro_batch!r} is neither a number of samples nor {' nor '.join(WORDS)}")


def chunk_sizes(batch: Batch, micro_batch: int | str | None) -> tuple[int | None, ...]:
    """List the sizes of a chunk that may be taken, the largest first.

    Args:
        batch: A full batch.
        micro_batch: Samples in a chunk, or one of :data:`WORDS`; ``None`` is the full batch.

    """
    if micro_batch is None:
        return (None,)
    if isinstance(micro_batch, int):
        return (min(micro_batch, batch.samples),)
    sizes = [batch.samples]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return tuple(sizes)
