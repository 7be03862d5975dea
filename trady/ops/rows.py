"""Which rows of a gradient are not zero, and products over these alone.

A classifier that reads one token of a sequence, or padding, leaves most rows of a transformer's gradients exactly
zero. Their products are zero without being computed.
"""

# R rows, O output features, C input features: gradient_RO, matrix_OC, product_RC.

from __future__ import annotations

import torch
from torch import Tensor

#: Minimum share of zero rows for which looking for them pays.
_MINIMUM_ZERO_SHARE = 0.25

#: What one more product costs, in rows: runs that are further apart are computed separately.
_ROWS_A_PRODUCT = 16

#: With fewer rows than this, all are computed.
_MINIMUM_ROWS = 64

#: With fewer elements than this, many rows are needed: looking at them takes as long as their product.
_MINIMUM_ELEMENTS, _MANY_ROWS = 1 << 14, 128

#: Columns looked at first.
_PROBES = 4


def multiply_rows(gradient: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the rows of a gradient by a matrix, those that are zero left out.

    A zero row stays zero even where the matrix is not finite. This takes no more memory than the full product: runs
    of rows, or every n-th row, are read and written in place.

    Args:
        gradient: [..., out].
        matrix: [out, in].

    Returns:
        The product, [..., in].

    """
    runs = nonzero_rows(gradient)
    if runs is None:
        return gradient @ matrix
    gradient_RO = gradient.view(-1, gradient.shape[-1])
    product_RC = gradient_RO.new_zeros((gradient_RO.shape[0], matrix.shape[1]))
    for run in runs:
        torch.mm(gradient_RO[run], matrix, out=product_RC[run])
    return product_RC.view(*gradient.shape[:-1], matrix.shape[1])


def nonzero_rows(gradient: Tensor) -> list[slice] | None:
    """Slices of the rows [..., features] that are not zero; ``None`` where all rows should be computed.

    On accelerators, where the answer would have to wait for the device, all are.
    """
    if type(gradient) is not Tensor or gradient.device.type != "cpu" or not gradient.is_contiguous():
        return None
    if not gradient.numel():
        return None
    rows = gradient.view(-1, gradient.shape[-1])
    count = rows.shape[0]
    if count < _MINIMUM_ROWS or (count < _MANY_ROWS and gradient.numel() < _MINIMUM_ELEMENTS):
        return None
    probes = rows[:, :: -(-rows.shape[1] // _PROBES)]
    # A row of zeros has no probe that is none: so many leave no room for enough of such rows.
    if int(torch.count_nonzero(probes)) > (1 - _MINIMUM_ZERO_SHARE) * probes.numel():
        return None
    zero = (probes == 0).all(1)
    if int(zero.sum()) < _MINIMUM_ZERO_SHARE * count:
        return None
    nonzero = ((rows.amax(1) != 0) | (rows.amin(1) != 0)).nonzero().flatten()  # a row with NaN is not zero
    runs = _every_nth(nonzero) or _runs(nonzero)
    computed = sum(len(range(*run.indices(count))) for run in runs)
    return runs if computed + _ROWS_A_PRODUCT * len(runs) <= (1 - _MINIMUM_ZERO_SHARE) * count else None


def _every_nth(nonzero: Tensor) -> list[slice]:
    """One slice, if the rows are at equal distances: the same token of every sample."""
    if len(nonzero) < 2:
        return []
    first, step = int(nonzero[0]), int(nonzero[1] - nonzero[0])
    even = step > 1 and bool((nonzero.diff() == step).all())
    return [slice(first, int(nonzero[-1]) + 1, step)] if even else []


def _runs(nonzero: Tensor) -> list[slice]:
    """Runs of such rows; two that lie close together become one, with the zero rows between them."""
    if not len(nonzero):
        return []
    apart = (nonzero.diff() > _ROWS_A_PRODUCT).nonzero().flatten()
    starts = [int(nonzero[0]), *nonzero[apart + 1].tolist()]
    stops = [*(nonzero[apart] + 1).tolist(), int(nonzero[-1]) + 1]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
