"""Rules that say whether a call treats the samples of a batch one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trady.calls.names import ELEMENTWISE, name_of
from trady.ops.sample_axis import SampleAxis


@dataclass(frozen=True)
class SampledCall:
    """A call, and where samples lie in its tensors; ``None`` in what does not depend on the batch.

    Attributes:
        function: The torch function.
        call: What it means; ``None`` if it is not recognised.
        input_axes: Where samples lie in each tensor among its arguments.
        input_shapes: Shapes of these, in the traced batch.
        output_axes: Where samples lie in each tensor that it returns.
        output_shapes: Shapes of these.
        numbers: Whole numbers among its arguments, in order: sizes, dimensions, indices.
        keywords: The whole numbers among each of its keyword arguments.
        parameters: Parameters and buffers among its arguments.
    """

    function: Any
    call: Any
    input_axes: tuple[SampleAxis | None, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_axes: tuple[SampleAxis | None, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...] = ()
    keywords: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[Tensor, ...] = ()


#: Whether a call treats samples one by one.
SampleRule = Callable[[SampledCall], bool]


def aligned(call: SampledCall) -> bool:
    """Broadcasting: samples lie in the same dimension, counted from the last."""
    wanted = call.output_axes[0]
    assert wanted is not None
    place = wanted.dim - len(call.output_shapes[0])
    return all(
        axis is None or (axis.dim - len(shape) == place and axis.per_sample == wanted.per_sample)
        for axis, shape in zip(call.input_axes, call.input_shapes, strict=True)
    )


def as_many_places(call: SampledCall) -> bool:
    """As many places a sample before and after, in every tensor: nothing was taken from or put between samples."""
    places = {axis.per_sample for axis in (*call.input_axes, *call.output_axes) if axis is not None}
    return len(places) == 1


def samples_first(call: SampledCall) -> bool:
    """Samples lie in the first dimension of the first tensor."""
    first = call.input_axes[0]
    return first is not None and first.dim == 0 and as_many_places(call)


def _taken(call: SampledCall) -> bool:
    """Indexing by numbers and slices; an index tensor that grows with the batch would count samples."""
    return not any(call.input_axes[1:]) and as_many_places(call)


def _joined(call: SampledCall) -> bool:
    # An empty cache has no samples.
    joined = [axis for axis, shape in zip(call.input_axes, call.input_shapes, strict=True) if shape != (0,)]
    return len(set(joined)) == 1 and as_many_places(call)


def _reshaped(call: SampledCall) -> bool:
    """Samples stay the slowest index of their dimension if as many elements lie outside of it as before."""
    before, after = call.input_axes[0], call.output_axes[0]
    if before is None or after is None:
        return False
    return math.prod(call.input_shapes[0][: before.dim]) == math.prod(call.output_shapes[0][: after.dim])


def _over_dimension(call: SampledCall) -> bool:
    """Along dimensions that are not that of the samples; before them there is no other whole number."""
    axis, dimensions = call.input_axes[0], len(call.input_shapes[0])
    named = [call.keywords[name] for name in ("dim", "axis") if call.keywords.get(name)]
    dims = named[0] if named else call.numbers if name_of(call.function) == "squeeze" else call.numbers[:1]
    apart = axis is not None and all(n % dimensions != axis.dim for n in dims)
    return bool(dims) and apart and as_many_places(call)


def _normalised(call: SampledCall) -> bool:
    """Over the last dimensions, whose sizes are the numbers."""
    axis = call.input_axes[0]
    return axis is not None and axis.dim < len(call.input_shapes[0]) - len(call.numbers)


def _rolled(call: SampledCall) -> bool:
    axis, dimensions = call.input_axes[0], len(call.input_shapes[0])
    half = len(call.numbers) // 2
    dims = {n % dimensions for n in call.keywords.get("dims", call.numbers[half:])}
    return axis is not None and half > 0 and len(call.numbers) % 2 == 0 and axis.dim not in dims


def _multiplied(call: SampledCall) -> bool:
    """Matrix products of one sample each: samples in leading dimensions, or in the rows of the left matrix."""
    *left, right = zip(call.input_axes[-2:], call.input_shapes[-2:], strict=True)
    (a, a_shape), (b, b_shape) = left[0], right
    return (a is None or a.dim != len(a_shape) - 1) and (b is None or b.dim < len(b_shape) - 2) and len(a_shape) > 1


def _attended(call: SampledCall) -> bool:
    queries = zip(call.input_axes[:3], call.input_shapes[:3], strict=True)
    return all(axis is not None and axis.dim < len(shape) - 2 for axis, shape in queries) and as_many_places(call)


def _padded(call: SampledCall) -> bool:
    """The last dimensions, each by two numbers: a negative one would move samples out."""
    axis = call.input_axes[0]
    behind = len(call.numbers) - len(call.keywords.get("value", ()))
    widths = call.keywords.get("pad", call.numbers[:behind])
    if axis is None:
        return False
    from_last = len(call.input_shapes[0]) - 1 - axis.dim
    return not any(widths[2 * from_last : 2 * from_last + 2]) and as_many_places(call)


def _in_matrices(call: SampledCall) -> bool:
    """Something is done with each matrix of the last two dimensions."""
    axis = call.input_axes[0]
    return axis is not None and axis.dim < len(call.input_shapes[0]) - 2


def _looked_up(call: SampledCall) -> bool:
    return not any(call.input_axes[1:])


def _normalised_alone(call: SampledCall) -> bool:
    """Every sample with its own statistics; none is remembered in a buffer."""
    return all(isinstance(p, torch.nn.Parameter) for p in call.parameters) and samples_first(call)


def _any(call: SampledCall) -> bool:
    return True


_AS_MANY_PLACES = {
    "transpose", "permute", "movedim", "swapaxes", "swapdims", "t", "unsqueeze", "split", "chunk", "unbind", "select",
    "narrow", "tensor_split", "sum", "mean", "var", "std", "amax", "amin", "norm", "var_mean", "all", "any",
    "logsumexp", "one_hot",
}  # fmt: skip

_BY_NAME: dict[str, SampleRule] = {
    "view": _reshaped, "reshape": _reshaped, "flatten": _reshaped, "unflatten": _reshaped, "_unsafe_view": _reshaped,
    "expand": aligned, "broadcast_to": aligned, "getitem": _taken, "index_select": _taken, "cat": _joined,
    "concat": _joined, "concatenate": _joined, "stack": _joined, "hstack": _joined, "softmax": _over_dimension,
    "log_softmax": _over_dimension, "cumsum": _over_dimension, "normalize": _over_dimension, "glu": _over_dimension,
    "squeeze": _over_dimension, "gather": _over_dimension, "layer_norm": _normalised, "rms_norm": _normalised,
    "roll": _rolled,
    "matmul": _multiplied, "bmm": _multiplied, "baddbmm": _multiplied, "scaled_dot_product_attention": _attended,
    "pad": _padded, "tril": _in_matrices, "triu": _in_matrices, "embedding": _looked_up,
    "interpolate": samples_first, "unfold": samples_first, "pixel_shuffle": samples_first,
    "pixel_unshuffle": samples_first, "group_norm": samples_first, "instance_norm": _normalised_alone,
    "new_empty": _any, "new_zeros": _any, "new_ones": _any, "new_full": _any,
}  # fmt: skip


def rule_by_name(function: Any) -> SampleRule | None:
    """The rule of a torch function that is no kind of its own; ``None`` if it is not known."""
    name = name_of(function)
    if name in ELEMENTWISE:
        return aligned
    return _BY_NAME.get(name) or (as_many_places if name in _AS_MANY_PLACES else None)
