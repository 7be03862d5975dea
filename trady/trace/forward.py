"""The trace of a model on an example: the pass in which all runs, with values where the model looks at them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from trady.calls.kinds import WeightCall
from trady.errors import ModelError
from trady.model.batch import Batch
from trady.model.structure import with_tensors
from trady.process.compiler import compiler_is_loaded
from trady.trace.answers import Answer, Answers, Assumed, Replay
from trady.trace.draws import Draws
from trady.trace.observer import Observer
from trady.trace.recorder import NeedsValuesError, pass_of_ours, record
from trady.trace.refusal import refusal
from trady.trace.trace import Trace
from trady.trace.ways import note_other_ways

#: Random numbers are tried one by one up to so many: a pass each.
_MOST_FLIPS = 64


def trace_forward(
    model: nn.Module, example: Batch | Any, *, training: bool | None = None, like: Trace | None = None
) -> Trace:
    """Run ``model`` on shapes alone; it is untouched afterwards (:func:`trady.model.untouched.untouched`).

    Where the model looks at values, it runs once on the example itself, without a graph, to see what it sees there.
    Where it decides at random, it is traced on the way on which most of it runs, whatever the state of the generators.

    Args:
        model: Any module; its weights may lie on any device, also on meta.
        example: One batch as training will see it: a tensor, a tuple (positional arguments), a mapping
            (keyword arguments) or one object.
        training: Trace in training or evaluation mode; ``None`` keeps the model's own mode.
        like: A trace of another batch in this mode: the model is told what it saw there, and decides alike.

    Returns:
        The calls, values and module spans.

    Raises:
        ModelError: The model cannot run on the example, or its forward depends on the data.

    """
    known, batch = compiler_is_loaded(), Batch.of(example, model)
    try:
        return _trace(model, batch, training, like)
    except ModelError:
        if known or not compiler_is_loaded():
            raise
        return _trace(model, batch, training, like)  # the forward pass called torch.compile: now it can be told


def _trace(model: nn.Module, batch: Batch, training: bool | None, like: Trace | None) -> Trace:
    if like is None:
        return _largest(model, batch, training)
    if any(not answer.decides for answer in like.answers):
        raise ModelError("what the model sees in the example has a size that depends on its values")
    try:
        answers = Replay(like.answers, any_size=True)
        return record(model, batch, training, draws=like.draws, answers=answers, rounds=like.rounds)
    except NeedsValuesError as error:
        raise refusal(model, batch, error) from error.__cause__


def _traced(model: nn.Module, batch: Batch, training: bool | None, draws: Draws, rounds: int = 0) -> Trace:
    """Trace with these random numbers, after so many passes."""
    answers: Answers | None = None
    try:
        trace = record(model, batch, training, draws=draws, rounds=rounds)
    except NeedsValuesError as error:
        has_values = not any(t.is_meta for t in (*model.parameters(), *model.buffers(), *batch.tensors))
        try:
            answers = Replay(_observed(model, batch, training, draws)) if has_values else Assumed()
            trace = record(model, batch, training, draws=draws, answers=answers, rounds=rounds)
        except ModelError:
            raise
        except Exception as second:
            raise refusal(model, batch, error if isinstance(second, NeedsValuesError) else second) from second
    if trace.host_words:
        again = None if answers is None else Replay(trace.answers)
        trace = record(model, batch, training, draws=draws, answers=again, watching=True, rounds=rounds)
    return trace


def _observed(model: nn.Module, batch: Batch, training: bool | None, draws: Draws) -> tuple[Answer, ...]:
    """What the model sees in the example where it looks at values."""
    with pass_of_ours(model, batch, training, draws), Observer(model) as observer:
        args, kwargs = with_tensors(batch.arguments, observer.input)
        model(*args, **kwargs)
    return tuple(observer.answers)


def _largest(model: nn.Module, batch: Batch, training: bool | None) -> Trace:
    """Trace on the way on which most of the model runs, where it decides at random or by what it keeps in Python.

    Numbers close to one leave layers in where the model asks ``random < p``, those close to zero where it asks the
    other way round. Where neither way has all weights of the other one, the numbers are tried one by one. A model that
    keeps something in Python from one pass to the next is traced in its second pass too.
    """
    ways = [_traced(model, batch, training, Draws())]

    def try_way(draws: Draws, rounds: int = 0) -> None:
        try:
            ways.append(_traced(model, batch, training, draws, rounds))
        except ModelError:
            return  # the model cannot run like this

    if ways[0].words:
        try_way(Draws(high=False))
    for word in range(min(max(way.words for way in ways), _MOST_FLIPS)):
        best = max(ways, key=_reach)
        if all(_weights(best) >= _weights(way) for way in ways):
            break
        try_way(replace(best.draws, flipped=best.draws.flipped | {word}))
    if ways[0].keeps_state:
        try_way(max(ways, key=_reach).draws, rounds=1)
    best = max(ways, key=_reach)
    note_other_ways(best, [way for way in ways if way is not best])
    return best


def _weights(trace: Trace) -> set[int]:
    return {id(p) for entry in trace.calls if isinstance(entry.call, WeightCall) for p in entry.parameters}


def _reach(trace: Trace) -> tuple[int, int, int]:
    """How much of a model runs: weights, elements, calls."""
    elements: Iterable[int] = (math.prod(entry.output_shape) for entry in trace.calls)
    return len(_weights(trace)), sum(elements), len(trace.calls)
