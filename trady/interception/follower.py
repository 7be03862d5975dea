"""Follows a forward pass along the traced one: which call of the plan comes next, and what the plan says of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trady.analysis.fusion import FusionPlan
from trady.analysis.segments import Segment
from trady.calls.actions import Action
from trady.calls.canonical import untransposed
from trady.errors import ModelError, StateError
from trady.interception.deferred_segment import DeferredSegment
from trady.interception.forward_state import ForwardState
from trady.model.mode import current_section


def place_of(forward: ForwardState, function: Any, tensors: list[Tensor]) -> int | None:
    """Go on to the call of the plan that this one is; ``None`` where it is not in the plan.

    Raises:
        ModelError: It should be, since something was put off or overwritten.

    """
    place = _next_place(forward, function, tensors)
    return _outside_new_checkpoints(forward, place)


def action_at(forward: ForwardState, place: int | None) -> Action | None:
    """What the plan says of a call; what reaches beyond the module that was called is computed call by call."""
    if place is None or forward.plan is None:
        return None
    step = forward.plan.steps[place]
    return step.action if forward.span[0] <= step.first and step.last < forward.span[1] else None


def segment_at(forward: ForwardState, place: int | None) -> Segment | None:
    """The segment that begins with a call, all of it inside of the module that was called."""
    segment = None if place is None or forward.plan is None else forward.segments.get(place)
    if segment is None or not forward.span[0] <= segment.start < segment.end <= forward.span[1]:
        return None
    return segment


def departed(forward: ForwardState, function: Any) -> ModelError:
    """Say that ``function``, or the end if it is ``None``, is not what comes next; leave the plan."""
    plan, forward.plan, forward.writing = forward.plan, None, None
    came = "ended" if function is None else f"called {_name(function)}"
    at_end = plan is None or forward.cursor >= len(plan.steps)
    expected = "the end" if plan is None or at_end else _name(plan.steps[forward.cursor].function)
    return ModelError(
        f"the forward pass took another path than the traced one: it {came} where {expected} was "
        "expected. If the model's forward depends on data, random choices or outside state, pass fuse=False "
        "to trady.prepare; if it depends on the kind of batch, prepare with an example of that kind."
    )


def called_inside() -> StateError:
    """Say that the model may not be called from where it was."""
    return StateError(
        "a prepared model was called inside of the forward pass of another one: call it behind that one, in the loss, "
        "or call finish() on its tuner, make it a part of the other model and prepare that one"
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def _next_place(forward: ForwardState, function: Any, tensors: list[Tensor]) -> int | None:
    plan = forward.plan
    if plan is None:
        return None
    parameters = tuple(id(p) for p in map(untransposed, tensors) if id(p) in forward.own)
    if forward.writing is not None:
        return _next_place_in_segment(forward, plan, forward.writing, function, tensors, parameters)
    if forward.cursor >= len(plan.steps) and not parameters:
        return None  # a wrapper works on the output, which nothing has overwritten: Accelerate makes it float32
    if plan.decisions:
        return _next_place_or_way(forward, plan, function, parameters)
    if _is_call(plan, forward.cursor, function, parameters):
        forward.cursor += 1
        return forward.cursor - 1
    if forward.at_risk:
        raise departed(forward, function)
    # Nothing was put off or overwritten so far: calls may be missing or more (a mask that is only made for
    # padded batches), as long as the path comes back.
    if parameters:
        for place in range(forward.cursor, len(plan.steps)):
            if _is_call(plan, place, function, parameters):
                forward.cursor = place + 1
                return place
        forward.plan = None
    return None


def _next_place_or_way(
    forward: ForwardState, plan: FusionPlan, function: Any, parameters: tuple[int, ...]
) -> int | None:
    """The same in a model that decides by values or at random: from where it does, the path may be another one.

    The path comes back where a module, or a weight, of the plan is called. Until then all is computed call by call.
    """
    forward.decided()
    here = forward.cursor
    if not forward.lost and _is_call(plan, here, function, parameters) and _in_module(forward, plan, here):
        forward.cursor += 1
        return here
    if forward.at_risk:
        raise departed(forward, function)
    places = range(here, len(plan.steps)) if parameters else ()
    found = next((place for place in places if _is_call(plan, place, function, parameters)), None)
    forward.lost = found is None
    if found is not None:
        forward.cursor = found + 1
    return found


def _in_module(forward: ForwardState, plan: FusionPlan, place: int) -> bool:
    return not forward.modules or forward.modules[-1] == plan.steps[place].module


def entered(forward: ForwardState, module: str) -> None:
    """Come back to the plan where a module of it is called that was not expected yet."""
    forward.modules.append(module)
    span = _span_ahead(forward, module)
    if span is not None and (forward.lost or span[0] != forward.cursor):
        forward.decided()
        if not forward.at_risk and span[0] >= forward.cursor:
            forward.cursor, forward.lost = span[0], False


def left(forward: ForwardState, module: str) -> None:
    """Come back to the plan behind a module of it that has ended on another way."""
    if forward.modules:
        forward.modules.pop()
    span = _span_ahead(forward, module)
    if span is not None and span[0] <= forward.cursor < span[1]:
        forward.decided()
        if not forward.at_risk:
            forward.cursor, forward.lost = span[1], False
    elif span is not None and forward.cursor == span[1]:
        forward.lost = False


def _span_ahead(forward: ForwardState, module: str) -> tuple[int, int] | None:
    if forward.plan is None or not forward.plan.decisions or forward.writing is not None:
        return None
    return forward.plan.spans.get(module)


def _next_place_in_segment(
    forward: ForwardState,
    plan: FusionPlan,
    writing: DeferredSegment,
    function: Any,
    tensors: list[Tensor],
    parameters: tuple[int, ...],
) -> int | None:
    """The same while a segment is written down: what is made of ids and masks alone may be missing or more."""
    belongs = bool(parameters) or any(writing.knows(t) for t in tensors)
    place = forward.cursor
    while place in writing.segment.auxiliary and (belongs or not _is_call(plan, place, function, parameters)):
        place += 1
    if _is_call(plan, place, function, parameters):
        forward.cursor = place + 1
        return place
    if belongs or forward.at_risk:
        raise departed(forward, function)
    return None


def _is_call(plan: FusionPlan, place: int, function: Any, parameters: tuple[int, ...]) -> bool:
    if place >= len(plan.steps):
        return False
    step = plan.steps[place]
    return bool(step.function == function) and step.parameters == parameters


def _outside_new_checkpoints(forward: ForwardState, place: int | None) -> int | None:
    """Leave the plan where a call runs inside of a checkpoint that the trace did not see."""
    if place is None or forward.plan is None or not forward.plan.steps[place].own:
        return place
    (hooks, gradients), (hooks_before, gradients_before) = current_section(), forward.section
    if hooks == hooks_before and gradients >= gradients_before:
        return place
    refused = forward.at_risk or forward.writing is not None
    forward.plan, forward.writing = None, None
    if refused:
        raise ModelError(_CHECKPOINTED_SINCE)
    return None


_CHECKPOINTED_SINCE = (
    "gradient checkpointing was switched on after the model had been prepared: switch it on first, then call "
    "trady.prepare"
)
