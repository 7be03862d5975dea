"""Where the samples of a batch lie in every tensor of a forward pass, and which calls treat them one by one.

Read off two traces, one of them with every sample twice: what has doubled are samples. A segment of calls
that treats samples one by one can be computed in chunks of the batch, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

from trady.calls.names import TAKES_SIZES, name_of
from trady.calls.recognize import kind_of
from trady.calls.sample_rules import SampledCall, rule_by_name
from trady.ops.sample_axis import SampleAxis
from trady.trace.trace import Trace, TracedCall


@dataclass(frozen=True)
class CallSamples:
    """Where samples lie in one call; ``None`` in what does not depend on the batch.

    Attributes:
        inputs: In each tensor among its arguments.
        numbers: Which of the whole numbers among its arguments grow with the batch.
        outputs: In each tensor that it returns.
        shapes: Shapes of the tensors among its arguments.
    """

    inputs: tuple[SampleAxis | None, ...]
    numbers: tuple[bool, ...]
    outputs: tuple[SampleAxis | None, ...]
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
    entry: TracedCall,
    doubled: TracedCall,
    shapes: list[tuple[int, ...]],
    shapes_doubled: list[tuple[int, ...]],
    batch: int,
) -> CallSamples | None:
    """Find the samples in one call; ``shapes`` are those of what it returns."""
    pairs = (entry.shapes, doubled.shapes), (entry.numbers, doubled.numbers), (shapes, shapes_doubled)
    if any(len(a) != len(b) for a, b in pairs):
        return None
    try:
        inputs = tuple(_axis(a, b, batch) for a, b in zip(entry.shapes, doubled.shapes, strict=True))
        outputs = tuple(_axis(a, b, batch) for a, b in zip(shapes, shapes_doubled, strict=True))
        numbers = tuple(_grows(a, b) for a, b in zip(entry.numbers, doubled.numbers, strict=True))
    except _MixedError:
        return None
    found = CallSamples(inputs, numbers, outputs, entry.shapes)
    if any(numbers) and name_of(entry.function) not in TAKES_SIZES:
        return None
    if not any(inputs) and not any(outputs):
        return found  # the same for every batch
    kind = None if entry.call is None else kind_of(entry.call)
    sums = kind is not None and kind.sums_samples
    if not sums and not (outputs and all(outputs)):
        return None
    rule = (None if kind is None else kind.samples) or rule_by_name(entry.function)
    call = SampledCall(
        entry.function,
        entry.call,
        inputs,
        entry.shapes,
        outputs,
        tuple(shapes),
        entry.numbers,
        entry.keywords,
        entry.parameters,
    )
    return found if rule is not None and rule(call) else None


def _axis(once: tuple[int, ...], twice: tuple[int, ...], batch: int) -> SampleAxis | None:
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
