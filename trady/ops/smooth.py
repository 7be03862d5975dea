"""Smooth activations (GELU, SiLU, ...) that keep their derivative in a few bits an element, not their input.

The forward pass is PyTorch's own, bit for bit. The backward pass multiplies with the derivative, which lies between
two known bounds. It is kept as the nearest of 256 (16, 4) evenly spaced numbers; 0 and, where it is reached, 1 are
among them, so that nothing is lost where an activation is flat or linear. This is not exact;
:func:`derivative_error` measures the error. Keeping compressed activations for the backward pass: ActNN (arXiv
2104.14129), GACT (2206.11357); keeping a quantised derivative of the activation: Few-bit backward (2202.00441).
"""

# E elements of a dense tensor in the order of memory, 8 / bits codes a byte: codes_E (one a byte), packed_B.

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from trady.errors import BudgetError
from trady.ops.context import device_type, label_saved
from trady.ops.layout import CHUNK_BYTES, count_write, is_dense, is_owned, memory_format, rows_of
from trady.ops.native import library, on_this_processor
from trady.ops.once import once_differentiable

_aten = torch.ops.aten

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: By fidelity, the bits an element that the derivative is kept in; ``None`` is PyTorch's own backward pass.
FIDELITIES: dict[str, int | None] = {"exact": None, "8bit": 8, "4bit": 4, "2bit": 2}

#: Largest relative error (:func:`derivative_error`) that a derivative may be kept with.
LARGEST_ERROR = 0.1

#: Entries of the table in which the C kernel looks up codes: small enough for the fastest cache.
_ENTRIES = 1 << 13

#: Derivatives that the C kernel computes from input and output, in the order of its enum; it looks up the rest.
_FORMS = ("table", "sigmoid", "tanh", "silu", "hardswish", "elu", "gelu", "gelu_tanh")


#: Forward and backward on the CPU, 8 bits against PyTorch's own (3 million elements of float32): GELU takes
#: 0.9 to 1.1, its tanh form 0.7 to 1.0, Mish 0.6 to 0.8, SiLU 1.04 to 1.2. Others are left to PyTorch: Hardswish takes
#: at least 1.4 times as long, Softplus 1.2, and tanh and sigmoid keep only their output anyway.
_FAST = {
    torch.float32: frozenset({"gelu", "gelu_tanh", "mish", "silu"}),
    torch.bfloat16: frozenset({"gelu", "gelu_tanh", "mish"}),
}


@dataclass(frozen=True)
class Smooth:
    """A smooth activation.

    Attributes:
        name: ``gelu``, ``gelu_tanh``, ``silu``, ``mish``, ``tanh``, ``sigmoid``, ``hardswish``, ``elu``, ``softplus``.
        numbers: ``(alpha,)`` of ELU, ``(beta, threshold)`` of Softplus.
    """

    name: str
    numbers: tuple[float, ...] = ()

    def value(self, x: Tensor) -> Tensor:
        """Compute the activation as PyTorch does."""
        return _VALUES[self.name](x, *self.numbers)  # type: ignore[no-any-return]

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """Compute it into ``out``."""
        return _VALUES[self.name](x, *self.numbers, out=out)  # type: ignore[no-any-return]

    def derivative(self, x: Tensor) -> Tensor:
        """Its derivative at ``x``, as PyTorch's backward computes it."""
        return _DERIVATIVES[self.name](torch.ones_like(x), x, *self.numbers)  # type: ignore[no-any-return]


_VALUES: dict[str, Any] = {
    "gelu": _aten.gelu,
    "gelu_tanh": partial(_aten.gelu, approximate="tanh"),
    "silu": _aten.silu,
    "tanh": _aten.tanh,
    "sigmoid": _aten.sigmoid,
    "hardswish": _aten.hardswish,
    "mish": _aten.mish,
    "elu": _aten.elu,
    "softplus": _aten.softplus,
}
_DERIVATIVES: dict[str, Any] = {
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    "silu": _aten.silu_backward,
    "tanh": lambda g, x: _aten.tanh_backward(g, x.tanh()),
    "sigmoid": lambda g, x: _aten.sigmoid_backward(g, x.sigmoid()),
    "hardswish": _aten.hardswish_backward,
    "mish": _aten.mish_backward,
    "elu": lambda g, x, alpha: _aten.elu_backward(g, alpha, 1, 1, False, x),
    "softplus": _aten.softplus_backward,
}

#: All of them, with the numbers that PyTorch takes by default.
SMOOTH = tuple(Smooth(name, {"elu": (1.0,), "softplus": (1.0, 20.0)}.get(name, ())) for name in _VALUES)


@dataclass(frozen=True)
class Codes:
    """Evenly spaced numbers that derivatives are rounded to: ``(code - zero) * step``.

    Attributes:
        bits: Bits of a code.
        per_unit: Codes in an interval of length 1, an integer, so that 0 and 1 are among the numbers.
        zero: The code of 0.
    """

    bits: int
    per_unit: int
    zero: int

    @property
    def step(self) -> float:
        """Distance of neighbours; rounding is off by half of it at most."""
        return 1 / self.per_unit

    def encode(self, derivative: Tensor) -> Tensor:
        """The nearest code of every element, one a byte; the argument is overwritten."""
        codes = derivative.mul_(self.per_unit).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)
        return codes.nan_to_num_(self.zero).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What they stand for."""
        return codes.to(dtype).sub_(self.zero).mul_(self.step)


def _once(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make something once a process, outside the memory of whichever step, real or simulated, needs it first."""

    @lru_cache(maxsize=256)
    @wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _disable_current_modes():
            return make(*args, **kwargs)

    return made  # type: ignore[return-value]


@_once
def codes_of(kind: Smooth, bits: int) -> Codes:
    """Spread codes over the range of a derivative, as densely as they fit."""
    derivative = kind.derivative(torch.linspace(-_reach(kind), _reach(kind), 200_001, dtype=torch.float64))
    low, high, last = float(derivative.min()), float(derivative.max()), 2**bits - 1
    for per_unit in range(int((last + 1) / (high - low)), 0, -1):
        zero = max(0, math.ceil(-low * per_unit - 0.5))
        if zero <= last - high * per_unit + 0.5:
            return Codes(bits, per_unit, zero)
    raise ValueError(f"the derivative of {kind.name}{kind.numbers} is too large for {bits} bits")


def _reach(kind: Smooth) -> float:
    """Distance from 0 beyond which the derivative is constant, as far as 8 bits can tell."""
    return 4.0 if kind.name == "hardswish" else 12 / kind.numbers[0] if kind.name == "softplus" else 12.0


@_once
def derivative_error(kind: Smooth, bits: int) -> float:
    """Relative error of the gradient of this activation's input, measured on 65 536 standard normal inputs.

    ``|g (q - f')| / |g f'|`` for a gradient ``g`` that does not depend on the input, with ``q`` the derivative as kept.
    """
    quantiles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    exact = kind.derivative(torch.special.ndtri(quantiles))
    codes = codes_of(kind, bits)
    return float((codes.decode(codes.encode(exact.clone()), torch.float64) - exact).norm() / exact.norm())


def bits_for(kind: Smooth, fidelity: str) -> tuple[int | None, str | None]:
    """Bits an element that a fidelity takes for an activation, and a remark where they are more than asked for.

    Args:
        kind: The activation.
        fidelity: One of :data:`FIDELITIES`.

    Returns:
        Bits, ``None`` for PyTorch's own; the remark, ``None`` if there is none.

    Raises:
        BudgetError: An unknown fidelity.

    """
    wanted = _bits(fidelity)
    if wanted is None:
        return None, None
    if kind.name not in _FAST[torch.float32]:
        return None, f"{kind.name}: exact, since PyTorch's own is faster than one that keeps codes"
    for bits in sorted(b for b in FIDELITIES.values() if b is not None and b >= wanted):
        if _fits(kind, bits):
            if bits == wanted:
                return bits, None
            return bits, f"{kind.name}: {bits} bits an element, since {_why_not(kind, wanted)} in {wanted}"
    return None, f"{kind.name}: exact, since {_why_not(kind, 8)} in 8 bits"


def pays(x: Tensor, kind: Smooth) -> bool:
    """Whether :func:`smooth` is about as fast as PyTorch's own activation on this tensor, by measurement."""
    return type(x) is Tensor and device_type(x) == "cpu" and kind.name in _FAST.get(x.dtype, ())


def _bits(fidelity: str) -> int | None:
    if fidelity not in FIDELITIES:
        raise BudgetError(f"fidelity must be one of {', '.join(FIDELITIES)}, not {fidelity!r}")
    return FIDELITIES[fidelity]


def _fits(kind: Smooth, bits: int) -> bool:
    try:
        return derivative_error(kind, bits) <= LARGEST_ERROR
    except ValueError:
        return False


def _why_not(kind: Smooth, bits: int) -> str:
    try:
        return f"gradients would be off by {derivative_error(kind, bits):.0%}"
    except ValueError:
        return "its derivative does not fit"


def error_table() -> str:
    """The relative gradient error of every activation in 8, 4 and 2 bits, as lines of text."""
    lines = [f"{'activation':12}{'8 bits':>10}{'4 bits':>10}{'2 bits':>10}"]
    for kind in SMOOTH:
        errors = (f"{derivative_error(kind, bits):>10.2%}" for bits in (8, 4, 2))
        lines.append(f"{kind.name:12}{''.join(errors)}")
    return "\n".join(lines)


def smooth(x: Tensor, kind: Smooth, bits: int, *, in_place: bool = False) -> Tensor:
    """Apply a smooth activation; its backward needs a few bits an element.

    Args:
        x: Any shape, floating-point.
        kind: The activation.
        bits: 8, 4 or 2 bits an element are kept.
        in_place: Overwrite ``x`` (where it is dense); only where the model itself works in place.

    """
    out: Tensor = _Smooth.apply(x, kind, bits, in_place and is_dense(x))
    return out


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Smooth, bits: int, in_place: bool) -> Tensor:
        dense = x if is_dense(x) else x.contiguous()
        codes = codes_of(kind, bits)
        _, table = _coding(kind, codes)  # also while a step is simulated, so that a real step finds it made
        if device_type(x) == "cpu":
            table.view(-1)  # it is memory too: now those who count tensors have seen it
        y = dense if in_place else torch.empty_like(dense)
        if in_place:
            ctx.mark_dirty(x)
        ctx.codes, ctx.format = codes, memory_format(dense)
        ctx.save_for_backward(label_saved(_forward(dense, y, kind, codes), "bits"))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        references = sys.getrefcount(gradient)
        owned = is_owned(gradient, references)
        (packed,) = ctx.saved_tensors
        dense = gradient.contiguous(memory_format=ctx.format)
        out = dense if owned or dense is not gradient else torch.empty_like(dense)
        _multiply(dense, packed, ctx.codes, out)
        return out, None, None, None


def _forward(x: Tensor, y: Tensor, kind: Smooth, codes: Codes) -> Tensor:
    """Write the activation to ``y`` (it may be ``x``) in chunks, so that each is still in the cache when it is encoded.

    Returns:
        The codes of the derivatives at every element of a dense tensor, in the order of its memory.

    """
    inputs, outputs, a_byte = rows_of(x).reshape(-1), rows_of(y).reshape(-1), 8 // codes.bits
    packed = torch.empty(-(-x.numel() // a_byte), dtype=torch.uint8, device=x.device)
    if x.is_meta:
        return packed
    for chunk in _chunks(inputs):
        source, target = inputs[chunk], outputs[chunk]
        value = kind.value(source) if x is y else kind.write(source, target)
        _encode(source, value, kind, codes, packed[chunk.start // a_byte : -(-chunk.stop // a_byte)])
        if x is y:
            target.copy_(value)
    return packed


def _encode(x: Tensor, y: Tensor, kind: Smooth, codes: Codes, packed: Tensor) -> None:
    if not _encode_natively(x, y, kind, codes, packed):
        wide = x.to(torch.float32) if x.element_size() < 4 else x
        packed.copy_(_pack(codes.encode(kind.derivative(wide)), codes.bits))


def _multiply(gradient: Tensor, packed: Tensor, codes: Codes, out: Tensor) -> None:
    """Write the gradient times the derivative to ``out``, dense in the same layout (it may be the gradient)."""
    flat, target, a_byte = rows_of(gradient).reshape(-1), rows_of(out).reshape(-1), 8 // codes.bits
    if not gradient.is_meta and not _multiply_natively(flat, packed, codes, target):
        for chunk in _chunks(flat):
            found = _unpack(packed[chunk.start // a_byte : -(-chunk.stop // a_byte)], codes.bits)
            derivative = codes.decode(found[: chunk.stop - chunk.start], flat.dtype)
            torch.mul(flat[chunk], derivative, out=target[chunk])
    count_write(out)


def _chunks(flat: Tensor) -> list[slice]:
    """Cut so that temporaries stay small; each chunk begins on a byte of its own."""
    size = CHUNK_BYTES // max(4, flat.element_size())
    return [slice(i, min(flat.numel(), i + size)) for i in range(0, flat.numel(), size)]


def _pack(codes: Tensor, bits: int) -> Tensor:
    a_byte = 8 // bits
    if a_byte == 1:
        return codes
    if len(codes) % a_byte:
        codes = F.pad(codes, (0, -len(codes) % a_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    packed: Tensor = (codes.view(-1, a_byte) << shifts).sum(-1, dtype=torch.uint8)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten()


class _Coding(ctypes.Structure):
    """How derivatives become codes, as the C kernel reads it."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("entries", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("form", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("low", "scale", "per_unit", "zero", "alpha")),
    )


@_once
def _coding(kind: Smooth, codes: Codes) -> tuple[_Coding, Tensor]:
    """The coding, and the table that it points to."""
    reach = _reach(kind)
    table = codes.encode(kind.derivative(torch.linspace(-reach, reach, _ENTRIES, dtype=torch.float64)))
    form = _FORMS.index(kind.name) if kind.name in _FORMS else 0
    scale, alpha = (_ENTRIES - 1) / (2 * reach), kind.numbers[0] if kind.name == "elu" else 0.0
    pointer = table.data_ptr()
    return _Coding(pointer, _ENTRIES, codes.bits, form, -reach, scale, codes.per_unit, codes.zero, alpha), table


def _encode_natively(flat: Tensor, value: Tensor, kind: Smooth, codes: Codes, packed: Tensor) -> bool:
    kernels = library() if on_this_processor(flat, value) else None
    if kernels is None or flat.dtype not in (torch.float32, torch.bfloat16):
        return False
    encode = kernels.trady_encode_f32 if flat.dtype == torch.float32 else kernels.trady_encode_bf16
    coding, _ = _coding(kind, codes)
    encode(flat.data_ptr(), value.data_ptr(), packed.data_ptr(), flat.numel(), ctypes.byref(coding))
    return True


def _multiply_natively(flat: Tensor, packed: Tensor, codes: Codes, out: Tensor) -> bool:
    kernels = library() if on_this_processor(flat, out) else None
    if kernels is None or flat.dtype not in (torch.float32, torch.bfloat16):
        return False
    decode = kernels.trady_decode_f32 if flat.dtype == torch.float32 else kernels.trady_decode_bf16
    decode(flat.data_ptr(), packed.data_ptr(), out.data_ptr(), flat.numel(), codes.bits, codes.zero, codes.step)
    return True
