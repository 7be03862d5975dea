"""Packed sequences decomposed: ``pack_padded_sequence`` and its inverse as reading and writing rows.

PyTorch's own functions pack no fake tensor. Lengths are whole numbers, and those keep their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _rows(sizes: Tensor, steps: int, sequences: int, batch_first: bool) -> Tensor:
    """Where the rows of packed sequences lie in padded ones, [steps, sequences] or the other way round."""
    step, sequence = (torch.arange(sequences) < sizes[:, None]).nonzero(as_tuple=True)
    return sequence * steps + step if batch_first else step * sequences + sequence


def _pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """``torch._pack_padded_sequence``: the rows of all sequences, longest first, step by step, and their numbers."""
    sequences, steps = x.shape[:2] if batch_first else x.shape[1::-1]
    lengths = lengths.cpu()
    known = lengths.tolist()
    if len(known) != sequences or not 0 < known[-1] <= known[0] <= steps or known != sorted(known, reverse=True):
        raise RuntimeError(
            f"lengths are {known}; they must be those of {sequences} sequences, longest first, of 1 to {steps} steps"
        )
    sizes = (lengths > torch.arange(int(lengths[0]))[:, None]).sum(1)
    index = _rows(sizes, steps, sequences, batch_first).to(x.device)
    return x.flatten(0, 1).index_select(0, index), sizes


def _pad(rows: Tensor, sizes: Tensor, batch_first: bool, value: float, total_length: int = -1) -> tuple[Tensor, Tensor]:
    """``torch._pad_packed_sequence``: padded sequences again, and their lengths."""
    steps, sequences = max(len(sizes), total_length), int(sizes[0])
    index = _rows(sizes, steps, sequences, batch_first).to(rows.device)
    padded = rows.new_full((steps * sequences, *rows.shape[1:]), value).index_copy(0, index, rows)
    lengths = (sizes[:, None] > torch.arange(sequences)).sum(0)
    return padded.unflatten(0, (sequences, steps) if batch_first else (steps, sequences)), lengths


#: By function, the same computation in calls that are seen one by one.
PACKING: dict[Any, Callable[..., Any]] = {
    torch._pack_padded_sequence: _pack,
    torch._pad_packed_sequence: _pad,
}
