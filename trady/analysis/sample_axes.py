"""Where the samples of a batch lie in every tensor of a forward pass, and which calls treat them one by one.

Read off two traces, one of them with every sample twice: what has doubled are samples. A segment of calls
that treats samples one by one can be computed in parts of the batch, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trady.calls.kinds import (
    ActivationCall,
    AveragePoolCall,
    DropoutCall,
    LossCall,
    MaxPoolCall,
    NormCall,
    PadCall,
    RecurrentCall,
    WeightCall,
)
from trady.calls.names import ELEMENTWISE, name_of
from trady.ops.sample_axis import SampleAxis
from trady.trace.trace import Trace, TracedCall


@dataclass(frozen=True)
class CallSamples:
    """Where samples lie in one call; ``None`` in what does not depend on the batch.

    Attributes:
        tensors: In each tensor among its arguments.
        numbers: Which of the whole numbers among its arguments grow with the batch.
        made: In each tensor that it returns.
        shapes: Shapes of the tensors among its arguments.
    """

    tensors: tuple[SampleAxis | None, ...]
    numbers: tuple[bool, ...]
    made: tuple[SampleAxis | None, ...]
    shapes: tuple[tuple[int, ...], ...] = ()


def samples_of(once: Trace, twice: Trace) -> list[CallSamples | None]:
    """Find the samples in every call.

    Args:
        once: The trace of a batch.
        twice: That of the same batch with every sample in it twice.

    Returns:
        One entry a call; ``None`` for calls that mix samples, or are not known not to.

    """
    if [entry.function for entry in once.calls] != [entry.function for entry in twice.calls]:
        return [None] * len(once.calls)
    return [
        _samples(entry, doubled, _shapes(once, entry), _shapes(twice, doubled), once.batch)
        for entry, doubled in zip(once.calls, twice.calls, strict=True)
    ]


def carried_over(known: Trace, samples: list[CallSamples | None], trace: Trace) -> list[CallSamples | None] | None:
    """Find the samples of another trace of the same batch, in evaluation mode, without tracing the batch doubled.

    Args:
        known: A trace whose samples are known.
        samples: These, one entry a call.
        trace: The other trace.

    Returns:
        One entry a call; ``None`` where the trace has a call that the known one has not, or not in this order. (Calls
        may be missing: dropout.)

    """
    found: list[CallSamples | None] = []
    place = 0
    for entry in trace.calls:
        while place < len(known.calls) and not _same_call(known, known.calls[place], trace, entry):
            place += 1
        if place == len(known.calls):
            return None
        found.append(samples[place])
        place += 1
    return found


def _same_call(known: Trace, a: TracedCall, trace: Trace, b: TracedCall) -> bool:
    # Dropout is a call of its own kind in training mode only; samples lie the same way in both.
    kinds = type(a.call) is type(b.call) or name_of(a.function) == "dropout"
    same = a.function == b.function and kinds and a.module == b.module
    same = same and (a.shapes, a.numbers, a.keywords) == (b.shapes, b.numbers, b.keywords)
    same = same and [id(p) for p in a.parameters] == [id(p) for p in b.parameters]
    return same and _shapes(known, a) == _shapes(trace, b)


def _shapes(trace: Trace, entry: TracedCall) -> list[tuple[int, ...]]:
    return [trace.values[value].shape for value in entry.makes]


class _MixedError(Exception):
    """A call that mixes samples."""


def _samples(
    entry: TracedCall, doubled: TracedCall, made: list[tuple[int, ...]], made_twice: list[tuple[int, ...]], batch: int
) -> CallSamples | None:
    pairs = (entry.shapes, doubled.shapes), (entry.numbers, doubled.numbers), (made, made_twice)
    if any(len(a) != len(b) for a, b in pairs):
        return None
    try:
        tensors = tuple(_along(a, b, batch) for a, b in zip(entry.shapes, doubled.shapes, strict=True))
        outputs = tuple(_along(a, b, batch) for a, b in zip(made, made_twice, strict=True))
        numbers = tuple(_grows(a, b) for a, b in zip(entry.numbers, doubled.numbers, strict=True))
    except _MixedError:
        return None
    found = CallSamples(tensors, numbers, outputs, entry.shapes)
    name = name_of(entry.function)
    if any(numbers) and name not in _SIZED:
        return None
    if not any(tensors) and not any(outputs):
        return found  # the same for every batch
    if isinstance(entry.call, LossCall):
        return found if tensors[0] == tensors[1] == SampleAxis(0, tensors[0].per_sample if tensors[0] else 0) else None
    if not made or not all(outputs):
        return None
    rule = _RECOGNISED.get(type(entry.call)) or _rule(name)
    return found if rule is not None and rule(entry, found, made) else None


def _along(once: tuple[int, ...], twice: tuple[int, ...], batch: int) -> SampleAxis | None:
    if len(once) != len(twice):
        raise _MixedError
    grown = [d for d, (a, b) in enumerate(zip(once, twice, strict=True)) if a != b]
    if not grown:
        return None
    dim = grown[0]
    if len(grown) > 1 or twice[dim] != 2 * once[dim] or once[dim] % batch:
        raise _MixedError
    return SampleAxis(dim, once[dim] // batch)


def _grows(once: int, twice: int) -> bool:
    if once != twice and twice != 2 * once:
        raise _MixedError
    return once != twice


Rule = Callable[[TracedCall, CallSamples, list[tuple[int, ...]]], bool]


def _aligned(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Broadcasting: samples lie in the same dimension, counted from the last."""
    wanted = found.made[0]
    assert wanted is not None
    place = wanted.dim - len(made[0])
    return all(
        along is None or (along.dim - len(shape) == place and along.per_sample == wanted.per_sample)
        for along, shape in zip(found.tensors, entry.shapes, strict=True)
    )


def _kept(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """As many places a sample before and after, in every tensor: nothing was taken from or put between samples."""
    places = {along.per_sample for along in (*found.tensors, *found.made) if along is not None}
    return len(places) == 1


def _taken(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Indexing by numbers and slices; an index tensor that grows with the batch would count samples."""
    return not any(found.tensors[1:]) and _kept(entry, found, made)


def _joined(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    joined = [a for a, shape in zip(found.tensors, entry.shapes, strict=True) if shape != (0,)]  # an empty cache
    return len(set(joined)) == 1 and _kept(entry, found, made)


def _reshaped(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Samples stay the slowest index of their dimension if as many elements lie outside of it as before."""
    before, after = found.tensors[0], found.made[0]
    if before is None or after is None:
        return False
    return math.prod(entry.shapes[0][: before.dim]) == math.prod(made[0][: after.dim])


def _over_dimension(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """SampleAxis dimensions that are not that of the samples; before them there is no other whole number."""
    along, dimensions = found.tensors[0], len(entry.shapes[0])
    named = [entry.keywords[name] for name in ("dim", "axis") if entry.keywords.get(name)]
    dims = named[0] if named else entry.numbers if name_of(entry.function) == "squeeze" else entry.numbers[:1]
    apart = along is not None and all(n % dimensions != along.dim for n in dims)
    return bool(dims) and apart and _kept(entry, found, made)


def _normalised(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Over the last dimensions, whose sizes are the numbers."""
    along = found.tensors[0]
    return along is not None and along.dim < len(entry.shapes[0]) - len(entry.numbers)


def _rolled(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    along, dimensions = found.tensors[0], len(entry.shapes[0])
    half = len(entry.numbers) // 2
    dims = {n % dimensions for n in entry.keywords.get("dims", entry.numbers[half:])}
    return along is not None and half > 0 and len(entry.numbers) % 2 == 0 and along.dim not in dims


def _multiplied(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Matrix products of one sample each: samples in leading dimensions, or in the rows of the left matrix."""
    *left, right = zip(found.tensors[-2:], entry.shapes[-2:], strict=True)
    (a, a_shape), (b, b_shape) = left[0], right
    return (a is None or a.dim != len(a_shape) - 1) and (b is None or b.dim < len(b_shape) - 2) and len(a_shape) > 1


def _attended(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    queries = zip(found.tensors[:3], entry.shapes[:3], strict=True)
    return all(a is not None and a.dim < len(shape) - 2 for a, shape in queries) and _kept(entry, found, made)


def _by_weight(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    call = entry.call
    assert isinstance(call, WeightCall)
    position = 1 if call.operator.kind == "addmm" else 0
    x, others = found.tensors[position], [*found.tensors[:position], *found.tensors[position + 1 :]]
    if x is None or any(others):
        return False
    return x.dim == 0 if call.operator.kind.startswith("conv") else x.dim < len(entry.shapes[position]) - 1


def _by_steps(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Sequences one by one: packed ones are mixed, and steps depend on each other."""
    call = entry.call
    assert isinstance(call, RecurrentCall)
    gates, *others = found.tensors
    states, weights = others[: len(found.made) - 1], others[len(found.made) - 1 :]
    if gates is None or call.steps.sizes or any(weights):
        return False
    of_batch = SampleAxis(1 if call.steps.time == 0 else 0, gates.per_sample)
    of_state = SampleAxis(0, gates.per_sample)
    return gates == found.made[0] == of_batch and all(s == of_state for s in (*states, *found.made[1:]))


def _first(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    return found.tensors[0] is not None and found.tensors[0].dim == 0 and _kept(entry, found, made)


def _padded(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """The last dimensions, each by two numbers: a negative one would move samples out."""
    along = found.tensors[0]
    behind = len(entry.numbers) - len(entry.keywords.get("value", ()))
    widths = entry.keywords.get("pad", entry.numbers[:behind])
    if along is None:
        return False
    from_last = len(entry.shapes[0]) - 1 - along.dim
    return not any(widths[2 * from_last : 2 * from_last + 2]) and _kept(entry, found, made)


def _in_matrices(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Something is done with each matrix of the last two dimensions."""
    along = found.tensors[0]
    return along is not None and along.dim < len(entry.shapes[0]) - 2


def _looked_up(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    return not any(found.tensors[1:])


def _normalised_alone(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    """Every sample with its own statistics; none is remembered in a buffer."""
    return all(isinstance(p, torch.nn.Parameter) for p in entry.parameters) and _first(entry, found, made)


def _always(entry: TracedCall, found: CallSamples, made: list[tuple[int, ...]]) -> bool:
    return True


#: Shape arguments: numbers that grow with the batch are sizes there.
_SIZED = {"view", "reshape", "expand", "unflatten", "_unsafe_view", "broadcast_to", "view_as", "reshape_as",
          "new_empty", "new_zeros", "new_ones", "new_full"}  # fmt: skip

_KEEPS = {
    "transpose", "permute", "movedim", "swapaxes", "swapdims", "t", "unsqueeze", "split", "chunk", "unbind", "select",
    "narrow", "tensor_split", "sum", "mean", "var", "std", "amax", "amin", "norm", "var_mean", "all", "any",
    "logsumexp", "one_hot",
}  # fmt: skip

_RULES: dict[str, Rule] = {
    "view": _reshaped, "reshape": _reshaped, "flatten": _reshaped, "unflatten": _reshaped, "_unsafe_view": _reshaped,
    "expand": _aligned, "broadcast_to": _aligned, "getitem": _taken, "index_select": _taken, "cat": _joined,
    "concat": _joined, "concatenate": _joined, "stack": _joined, "hstack": _joined, "softmax": _over_dimension,
    "log_softmax": _over_dimension, "cumsum": _over_dimension, "normalize": _over_dimension, "glu": _over_dimension,
    "squeeze": _over_dimension, "gather": _over_dimension, "layer_norm": _normalised, "rms_norm": _normalised,
    "roll": _rolled,
    "matmul": _multiplied, "bmm": _multiplied, "baddbmm": _multiplied, "scaled_dot_product_attention": _attended,
    "pad": _padded, "tril": _in_matrices, "triu": _in_matrices, "embedding": _looked_up,
    "interpolate": _first, "unfold": _first, "pixel_shuffle": _first, "pixel_unshuffle": _first,
    "group_norm": _first, "instance_norm": _normalised_alone,
    "new_empty": _always, "new_zeros": _always, "new_ones": _always, "new_full": _always,
}  # fmt: skip


def _rule(name: str) -> Rule | None:
    if name in ELEMENTWISE:
        return _aligned
    return _RULES.get(name) or (_kept if name in _KEEPS else None)


_RECOGNISED: dict[type, Rule] = {
    WeightCall: _by_weight,
    RecurrentCall: _by_steps,
    NormCall: _first,
    ActivationCall: _aligned,
    PadCall: _first,
    MaxPoolCall: _first,
    AveragePoolCall: _first,
    DropoutCall: _aligned,
}
