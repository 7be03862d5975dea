"""Which rows of a gradient are not zero, and products over those alone.

A classifier that reads one token of a sequence, or padding, leaves most rows of a transformer's gradients exactly
zero. Their products are known without being computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: From this share of zero rows on, looking for them pays.
_LEAST_ZERO = 0.25

#: What one more product costs, in rows: so far apart two runs are computed apart.
_ROWS_A_PRODUCT = 16

#: Fewer rows than this are computed as they are.
_FEWEST = 64

#: Columns looked at first.
_PROBES = 4


def multiply_rows(gradient: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the rows of a gradient by a matrix, those that are zero left out.

    A zero row stays zero even where the matrix is not finite. Takes no more memory than the whole product: runs of
    rows, or every n-th, are read and written in place.

    Args:
        gradient: [..., out].
        matrix: [out, in].

    Returns:
        The product, [..., in].

    """
    parts = rows_that_count(gradient)
    if parts is None:
        return gradient @ matrix
    rows = gradient.view(-1, gradient.shape[-1])
    product = rows.new_zeros((rows.shape[0], matrix.shape[1]))
    for part in parts:
        torch.mm(rows[part], matrix, out=product[part])
    return product.view(*gradient.shape[:-1], matrix.shape[1])


def rows_that_count(gradient: Tensor) -> list[slice] | None:
    """Slices of the rows [..., features] in which anything is not zero; ``None`` where all should be computed.

    On accelerators, where asking would wait for the device, all are.
    """
    if type(gradient) is not Tensor or gradient.device.type != "cpu" or not gradient.is_contiguous():
        return None
    if not gradient.numel():
        return None
    rows = gradient.view(-1, gradient.shape[-1])
    count = rows.shape[0]
    if count < _FEWEST:
        return None
    zero = (rows[:, :: -(-rows.shape[1] // _PROBES)] == 0).all(1)
    if int(zero.sum()) < _LEAST_ZERO * count:
        return None
    counting = ((rows.amax(1) != 0) | (rows.amin(1) != 0)).nonzero().flatten()  # a row with NaN counts
    parts = _every(counting) or _runs(counting)
    computed = sum(len(range(*part.indices(count))) for part in parts)
    return parts if computed + _ROWS_A_PRODUCT * len(parts) <= (1 - _LEAST_ZERO) * count else None


def _every(counting: Tensor) -> list[slice]:
    """One slice, where rows count at equal distances: the same token of every sample."""
    if len(counting) < 2:
        return []
    first, step = int(counting[0]), int(counting[1] - counting[0])
    even = step > 1 and bool((counting.diff() == step).all())
    return [slice(first, int(counting[-1]) + 1, step)] if even else []


def _runs(counting: Tensor) -> list[slice]:
    """Runs of rows that count; what is between two that lie close together is computed too."""
    if not len(counting):
        return []
    apart = (counting.diff() > _ROWS_A_PRODUCT).nonzero().flatten()
    starts = [int(counting[0]), *counting[apart + 1].tolist()]
    stops = [*(counting[apart] + 1).tolist(), int(counting[-1]) + 1]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
