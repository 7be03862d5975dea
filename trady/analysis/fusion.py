"""Which calls of a trace can be computed together, and which may overwrite their input.

Both are allowed only where the trace proves that nobody else reads what disappears: the value between
two calls has one reader, nobody holds it when the forward pass has ended, and it is no view of another.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trady.calls.actions import Action, Done, InPlace, Leave, WithLayer
from trady.calls.kinds import ActivationCall, NormCall, PadCall, RecurrentCall, WeightCall
from trady.calls.recognize import kind_of
from trady.model.hooks import KnownHooks
from trady.ops.frozen_norm import FrozenNorm
from trady.ops.quantized import is_quantized
from trady.trace.answers import Answer
from trady.trace.draws import Draws
from trady.trace.trace import Trace, TracedCall

#: Functions whose backward does not read their output and whose output is memory of its own.
_OUTPUT_NOT_SAVED = {
    torch.add,
    torch.sub,
    torch.cat,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.sub,
    torch.Tensor.sub_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
    torch.Tensor.__sub__,
    operator.add,
    operator.iadd,
}


@dataclass(frozen=True)
class Step:
    """What the next call of a forward pass will be, and what to do with it.

    Attributes:
        function: The torch function.
        parameters: Identities of the parameters among its arguments: calls may look alike and differ in these.
        action: How it is computed; ``None`` is on its own.
        first: First call that the action depends on.
        last: Last call that the action depends on.
        own: Whether it runs outside of checkpoints and segments without gradients.
        module: The innermost module that calls it.
    """

    function: Any
    parameters: tuple[int, ...] = ()
    action: Action | None = None
    first: int = 0
    last: int = 0
    own: bool = True
    module: str = ""


@dataclass(frozen=True)
class FusionPlan:
    """The expected calls of a forward pass, with the place where each module's own calls start.

    Attributes:
        steps: One entry a call.
        spans: First call and one past the last call of every module that is called once.
        saved_shapes: For a weight call, the shape of the input that is saved (before deferred padding).
        hooks: The forward hooks that ran in it, so that what they read is known to be read.
        way: How the model was called.
        draws: What random numbers were.
        answers: To the calls that look at values.
        decisions: The calls in front of which the model may decide to go another way.
        rounds: Passes of the model in front of this one, with what it kept in Python from one to the next.
        norms: Its frozen normalisations, whose scales and shifts stay when the pass is over.
    """

    steps: tuple[Step, ...]
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    saved_shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    hooks: KnownHooks = frozenset()
    way: tuple[Any, ...] = ()
    draws: Draws = field(default_factory=Draws)
    answers: tuple[Answer, ...] = ()
    decisions: frozenset[int] = frozenset()
    rounds: int = 0
    norms: tuple[FrozenNorm, ...] = ()


def plan_fusion(trace: Trace, plain: set[int], *, fuse: bool = True) -> FusionPlan:
    """Decide for every call of a trace how it is computed.

    Args:
        trace: The forward pass.
        plain: Identities of parameters that train through PyTorch's own backward (the head): calls that
            read one are left alone.
        fuse: Whether to fuse and overwrite at all.

    """
    actions: dict[int, Action] = {}
    saved_shapes: dict[int, tuple[int, ...]] = {}
    spans = _module_spans(trace)
    for index, entry in enumerate(trace.calls):
        if entry.scope is None and entry.call is not None:
            actions[index] = Leave()
        elif fuse and (entry.scope == "" or entry.scope in spans):
            if index in actions or any(id(p) in plain for p in entry.parameters):
                continue
            if isinstance(entry.call, RecurrentCall):
                actions[index] = InPlace(_owns_gates(trace, index))
            elif isinstance(entry.call, WeightCall):
                _fuse_layer(trace, index, plain, actions, saved_shapes)
            elif isinstance(entry.call, NormCall):
                _fuse_norm(trace, index, actions)
            elif entry.call is not None and kind_of(entry.call).overwrites_input:
                actions[index] = InPlace(_may_overwrite(trace, entry))
    return FusionPlan(
        tuple(_steps(trace, actions)),
        spans,
        saved_shapes,
        trace.hooks,
        trace.way,
        trace.draws,
        trace.answers,
        frozenset(trace.decisions),
        trace.rounds,
        tuple(_frozen_norms(trace, plain)),
    )


def _frozen_norms(trace: Trace, plain: set[int]) -> Iterator[FrozenNorm]:
    for entry in trace.calls:
        kept = entry.scope is not None and not any(id(p) in plain for p in entry.parameters)
        if kept and isinstance(entry.call, NormCall):
            yield entry.call.norm


def _steps(trace: Trace, actions: dict[int, Action]) -> list[Step]:
    steps = []
    for index, entry in enumerate(trace.calls):
        parameters = tuple(id(p) for p in entry.parameters if isinstance(p, torch.nn.Parameter))
        steps.append(
            Step(entry.function, parameters, actions.get(index), index, index, entry.scope == "", entry.module)
        )
    for index, action in actions.items():
        if not isinstance(action, (WithLayer, InPlace)):
            continue
        together = [index, *_computed_with(trace, index, action)]
        first = min(together)
        if isinstance(action, InPlace) and action.overwrite:
            first = _producer(trace, index)
        for member in together:
            steps[member] = replace(steps[member], first=first, last=max(together))
    return steps


def _computed_with(trace: Trace, index: int, action: WithLayer | InPlace) -> list[int]:
    """The calls that an action takes over."""
    found = [_producer(trace, index)] if isinstance(action, WithLayer) and action.pad else []
    norm = isinstance(action, WithLayer) and action.norm is not None
    for _ in range(norm + (action.clamp is not None)):
        index = trace.values[trace.calls[index].makes[0]].readers[0]
        found.append(index)
    return found


def _producer(trace: Trace, index: int) -> int:
    """The call that made what a call reads first."""
    return trace.values[trace.calls[index].reads[0]].producer


def _module_spans(trace: Trace) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    repeated: set[str] = set()
    for name, start, end in trace.spans:
        if name in spans:
            repeated.add(name)
        spans[name] = start, end
    return {name: span for name, span in spans.items() if name not in repeated}


def _only_reader(trace: Trace, value: int) -> int | None:
    """The one call that reads a value which is gone afterwards; ``None`` if there is no such call.

    Where the model decides while the value is there, others may read it on another way.
    """
    entry = trace.values[value]
    if len(entry.readers) != 1 or entry.kept or entry.view or trace.crosses_decision(value):
        return None
    return entry.readers[0]


def _next_call(trace: Trace, index: int, kind: type) -> int | None:
    """The only reader of what a call makes, if it is of the given kind and reads nothing else."""
    made = trace.calls[index].makes
    reader = _only_reader(trace, made[0]) if len(made) == 1 else None
    if reader is None:
        return None
    follower = trace.calls[reader]
    together = isinstance(follower.call, kind) and follower.reads == made and follower.scope == trace.calls[index].scope
    return reader if together else None


def _fuse_layer(
    trace: Trace,
    index: int,
    plain: set[int],
    actions: dict[int, Action],
    saved_shapes: dict[int, tuple[int, ...]],
) -> None:
    entry = trace.calls[index]
    call = entry.call
    assert isinstance(call, WeightCall)
    if not isinstance(call.weight, torch.nn.Parameter) or is_quantized(call.weight):
        return
    pad = _deferred_pad(trace, index)
    names = [call.operator.kind]
    last, norm, clamp = index, None, None
    follower = _next_call(trace, last, NormCall)
    if follower is not None and _scales_outputs(trace.calls[follower], call, plain):
        found = trace.calls[follower].call
        assert isinstance(found, NormCall)
        norm, last = found.norm, follower
        actions[follower] = Done()
        names.append("batch_norm")
    follower = _next_call(trace, last, ActivationCall)
    if follower is not None:
        activation = trace.calls[follower].call
        assert isinstance(activation, ActivationCall)
        clamp = activation.clamp
        actions[follower] = Done()
        names.append(clamp.name)
    if pad is not None:
        padding = trace.calls[pad].call
        assert isinstance(padding, PadCall)
        actions[pad] = Done()
        saved_shapes[index] = trace.calls[pad].input_shape
        actions[index] = WithLayer(padding.pad, norm, clamp, "+".join(["pad", *names]))
    else:
        actions[index] = WithLayer((), norm, clamp, "+".join(names))


def _deferred_pad(trace: Trace, index: int) -> int | None:
    """The zero padding right in front of a convolution that nothing but this convolution looks at."""
    call = trace.calls[index].call
    assert isinstance(call, WeightCall)
    if not call.operator.kind.startswith("conv") or not trace.calls[index].reads:
        return None
    value = trace.values[trace.calls[index].reads[0]]
    padding = trace.calls[value.producer]
    alone = _only_reader(trace, trace.calls[index].reads[0]) == index and not value.shape_readers
    batched = len(padding.input_shape) == len(call.weight.shape)
    adjacent = value.producer == index - 1  # so that nothing writes into the padding's input meanwhile
    together = adjacent and padding.scope == trace.calls[index].scope
    return value.producer if alone and batched and together and isinstance(padding.call, PadCall) else None


def _scales_outputs(norm: TracedCall, call: WeightCall, plain: set[int]) -> bool:
    """Whether a normalisation acts on the output channels of the layer and is itself frozen."""
    if any(id(p) in plain for p in norm.parameters) or not isinstance(norm.call, NormCall):
        return False
    # A gain scales filters, and the normalisation would have to scale their bias too.
    return len(norm.input_shape) == call.weight.dim() and call.eps is None


def _fuse_norm(trace: Trace, index: int, actions: dict[int, Action]) -> None:
    clamp = None
    follower = _next_call(trace, index, ActivationCall)
    if follower is not None:
        activation = trace.calls[follower].call
        assert isinstance(activation, ActivationCall)
        clamp = activation.clamp
        actions[follower] = Done()
    actions[index] = InPlace(_may_overwrite(trace, trace.calls[index]), clamp)


def _owns_gates(trace: Trace, index: int) -> bool:
    """Whether a recurrent layer alone reads its gates, which a linear layer has just made in memory of their own."""
    value = trace.values[trace.calls[index].reads[0]]
    producer = trace.calls[value.producer]
    linear = isinstance(producer.call, WeightCall) and not is_quantized(producer.call.weight)
    together = value.producer == index - 1 and producer.scope == trace.calls[index].scope
    alone = value.readers == [index] and not value.kept and not trace.crosses_decision(trace.calls[index].reads[0])
    return linear and together and alone


def _may_overwrite(trace: Trace, entry: TracedCall) -> bool:
    if not entry.reads:
        return False
    value = trace.values[entry.reads[0]]
    producer = trace.calls[value.producer]
    free = producer.call is not None and kind_of(producer.call).frees_result(producer.call)
    safe = free or producer.function in _OUTPUT_NOT_SAVED
    reader = _only_reader(trace, entry.reads[0])
    near = producer.container == entry.container and producer.scope == entry.scope
    return safe and near and reader is not None and trace.calls[reader] is entry
