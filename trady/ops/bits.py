"""Piecewise linear activations in one bit an element, exactly.

For a clamp ``y = min(max(x, low), high)`` (ReLU, ReLU6, Hardtanh) or a leaky ReLU the derivative
has two values, so one bit an element is all that the backward pass needs.
"""

# N rows (the samples), L elements a row, in the order of memory: rows_NL, bits_NB with B = ceil(L / 8) bytes.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trady.ops.context import device_type
from trady.ops.layout import count_write, rows_of
from trady.ops.native import library, on_this_processor

#: Elements that the plain PyTorch path packs at once: keeps its temporaries small.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Clamp:
    """``y = x`` inside (low, high), ``low`` or ``high`` outside; with a slope, ``slope * x`` below 0.

    ReLU is ``Clamp(0, inf)``, ReLU6 ``Clamp(0, 6)``, LeakyReLU ``Clamp(0, inf, slope)``.
    """

    low: float
    high: float = math.inf
    slope: float = 0.0

    @property
    def bound(self) -> float:
        """Values from here on have no gradient; NaN, which no comparison reaches, where there is no ``high``."""
        return math.nan if self.high == math.inf else self.high

    @property
    def name(self) -> str:
        """The activation's usual name."""
        if self.slope:
            return "leaky_relu"
        if self.low == 0:
            return "relu" if self.high == math.inf else f"relu{self.high:g}"
        return "hardtanh"


def clamp_(x: Tensor, clamp: Clamp, *, keep_bits: bool) -> Tensor | None:
    """Apply ``clamp`` to ``x`` in place; return its derivative as bits, if they are wanted.

    Args:
        x: Any dense tensor; overwritten.
        clamp: The activation.
        keep_bits: Whether the derivative is needed.

    Returns:
        uint8 of shape [rows, ceil(length / 8)]; bit j of byte i is 1 where element ``8 i + j`` of
        the row lies strictly inside the clamp. ``None`` without ``keep_bits``.

    """
    rows = rows_of(x)
    count, length = rows.shape
    bits = x.new_empty((count, -(-length // 8)), dtype=torch.uint8) if keep_bits else None
    if rows.numel() == 0 or _takes_no_memory(rows) or _clamp_natively(rows, clamp, bits):
        count_write(x)
        return bits
    for block, packed in _blocks(rows, bits):
        inside = ~((block <= clamp.low) | (block >= clamp.bound))
        if clamp.slope:
            torch.where(inside, block, block * clamp.slope, out=block)
        else:
            block.clamp_(clamp.low, clamp.high)
        if packed is not None:
            packed.copy_(_pack(inside))
    return bits


def select(gradient: Tensor, bits: Tensor, clamp: Clamp, out: Tensor) -> Tensor:
    """Write the gradient of the activation's input to ``out``: that of its output where the bit is 1.

    ``gradient`` and ``out`` have the shape and layout of the activation (``out`` may be ``gradient``).
    """
    rows, target = rows_of(gradient), rows_of(out)
    if rows.numel() == 0 or _takes_no_memory(rows) or _select_natively(rows, target, bits, clamp):
        count_write(out)
        return out
    length = rows.shape[1]
    for start in range(0, rows.shape[0], step := max(1, _BLOCK // max(1, length))):
        inside = _unpack(bits[start : start + step], length)
        block = rows[start : start + step]
        outside = block * clamp.slope if clamp.slope else torch.zeros((), dtype=block.dtype, device=block.device)
        target[start : start + step].copy_(torch.where(inside, block, outside))
    return out


def _takes_no_memory(rows: Tensor) -> bool:
    """Whether this is a simulated step for a CPU, where the C kernels make no temporaries."""
    return rows.is_meta and device_type(rows) == "cpu"


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean tensor, one bit an element: uint8 of shape [rows, ceil(length / 8)]."""
    rows = rows_of(mask)
    bits = rows.new_empty((rows.shape[0], -(-rows.shape[1] // 8)), dtype=torch.uint8)
    for block, packed in _blocks(rows, bits):
        packed.copy_(_pack(block))  # type: ignore[union-attr]
    return bits


def _blocks(rows: Tensor, bits: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    starts = range(0, rows.shape[0], step)
    return [(rows[i : i + step], None if bits is None else bits[i : i + step]) for i in starts]


def _pack(mask: Tensor) -> Tensor:
    rows, length = mask.shape
    if length % 8:
        mask = torch.nn.functional.pad(mask, (0, -length % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.view(rows, -1, 8).view(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def _unpack(bits: Tensor, length: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :length].bool()


def _clamp_natively(rows: Tensor, clamp: Clamp, bits: Tensor | None) -> bool:
    kernels = library() if on_this_processor(rows) else None
    if kernels is None:
        return False
    pointer, packed = rows.data_ptr(), None if bits is None else bits.data_ptr()
    count, length = rows.shape
    if rows.dtype == torch.float32:
        kernels.trady_clamp_f32(pointer, pointer, packed, count, length, clamp.low, clamp.bound, clamp.slope)
        return True
    if rows.dtype == torch.bfloat16 and not clamp.slope:
        bounds = torch.tensor([clamp.low, clamp.high], dtype=torch.bfloat16)
        if bounds.tolist() == [clamp.low, clamp.high]:
            low_bits, high_bits = (int(v) & 0xFFFF for v in bounds.view(torch.int16).tolist())
            kernels.trady_clamp_bf16(
                pointer, pointer, packed, count, length, clamp.low, clamp.bound, low_bits, high_bits
            )
            return True
    return False


def _select_natively(rows: Tensor, out: Tensor, bits: Tensor, clamp: Clamp) -> bool:
    kernels = library() if on_this_processor(rows, out) and rows.dtype == out.dtype else None
    if kernels is None:
        return False
    count, length = rows.shape
    if rows.dtype == torch.float32:
        kernels.trady_select_f32(rows.data_ptr(), out.data_ptr(), bits.data_ptr(), count, length, clamp.slope)
        return True
    if rows.dtype == torch.bfloat16 and not clamp.slope:
        kernels.trady_select_bf16(rows.data_ptr(), out.data_ptr(), bits.data_ptr(), count, length)
        return True
    return False
