"""Routes a model's own calls to the lean operations while its forward pass runs.

A ``TorchFunctionMode`` is pushed by a forward hook on the outermost module that is called and popped
when it returns or raises, so that classes, keys and ``print(model)`` stay as they are. The calls are
followed along the traced ones; where they leave the trace after something was fused or overwritten,
the forward pass is stopped rather than computed wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_iter

from trady.analysis.fusion import Action, Done, FusionPlan, InPlace, Leave, WithLayer
from trady.analysis.segments import Segment
from trady.calls.canonical import canonical, shown_parameter, transposed, transposes_weight
from trady.calls.decompositions import DECOMPOSITIONS
from trady.calls.kinds import (
    ActivationCall,
    AveragePoolCall,
    DropoutCall,
    LossCall,
    MaxPoolCall,
    NormCall,
    RecurrentCall,
    SmoothCall,
    WeightCall,
)
from trady.calls.questions import answer_about_device, is_metadata
from trady.calls.recognize import recognize
from trady.errors import ModelError
from trady.interception.deferred_segment import DeferredSegment
from trady.interception.frozen_norms import FrozenNorms
from trady.interception.layer import ArmedLayer
from trady.interception.program import Program
from trady.model.batch import tensors_among
from trady.model.eager import COMPILED, CompilersOff
from trady.model.hooks import Hook
from trady.model.mode import current_section, tracing
from trady.ops.activation import affine_clamp, clamp
from trady.ops.context import current_operation, internal_query
from trady.ops.dropout import dropout
from trady.ops.layer import LayerCall, layer
from trady.ops.layout import is_dense
from trady.ops.operators import Convolution
from trady.ops.pooling import average_pool, max_pool
from trady.ops.quantized import frozen_linear, is_quantized, quantized_linear
from trady.ops.recurrent.recurrence import RecurrentOptions, recurrent
from trady.ops.selected import DenseWeight
from trady.ops.smooth import bits_for, pays, smooth
from trady.trace.batch_counters import READS_ONE, batch_counters, batches_counted, is_count

#: Changes the arguments of a call before anything else is done with it.
PrepareCall = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Interceptor(TorchFunctionMode):
    """Computes a model's forward pass with the lean operations.

    Args:
        model: The model; only its hooks are touched.
        layers: The layers that can be updated by channel.
        plans: The expected calls in training (True) and in evaluation mode (False).
        plain: Identities of parameters that train through PyTorch's own backward (the head).
        segments: SegmentsByMode, in training and in evaluation mode, of which only the inputs are kept.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[ArmedLayer],
        plans: Mapping[bool, FusionPlan],
        plain: set[int],
        segments: Mapping[bool, Sequence[Segment]] | None = None,
    ) -> None:
        super().__init__()
        self._programs: dict[Segment, Program] = {}
        self.recompute(segments or {})
        self._writing: DeferredSegment | None = None
        self._wrote = False
        self._model, self._plans, self._plain = model, plans, plain
        self._layers = {id(armed.weight): armed for armed in layers}
        self._counters = batch_counters(model)
        self._norms = FrozenNorms(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._handles: list[Any] = []
        self._newest_hook = 0
        self._switched_on: frozenset[int] = frozenset()
        self._section = current_section()
        self._depth = 0
        self._outermost: FrameType | None = None
        self._compilers = CompilersOff()
        self._enabled = True
        self._plan: FusionPlan | None = None
        self._here: Mapping[int, Segment] = {}
        self._cursor = 0
        self._span = (0, 0)
        self._at_risk = False
        self._graph_only = False
        #: ``exact``, or the bits in which smooth activations keep their derivative (trady.ops.smooth.FIDELITIES).
        self.fidelity = "exact"
        self.before_forward: Callable[[], None] | None = None
        self.on_layer: Callable[[str], None] | None = None
        self.prepare_call: PrepareCall | None = None

    def recompute(self, segments: Mapping[bool, Sequence[Segment]]) -> None:
        """Keep only the inputs of these segments, from the next forward pass on."""
        self._segments = {mode: {segment.first: segment for segment in chosen} for mode, chosen in segments.items()}

    # -- arming ------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Hang the hooks into every module: a checkpointed segment is recomputed without the root."""
        for module in self._model.modules():
            enter, leave = Hook(self._enter, self._refuse_compiled), Hook(self._leave)
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._newest_hook, self._switched_on = self._hooks_now()[0], self._checkpointing_now()

    def disarm(self) -> None:
        """Take the hooks out again."""
        self._recover()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the model to PyTorch for a while: its own inference, untouched."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def _hooks_now(self) -> tuple[int, bool]:
        """Number of the newest forward hook (they count up), and whether there is a backward hook."""
        modules = list(self._model.modules())
        newest = max((number for m in modules for number in (*m._forward_hooks, *m._forward_pre_hooks)), default=0)
        return newest, any(m._backward_hooks or m._backward_pre_hooks for m in modules)

    def _checkpointing_now(self) -> frozenset[int]:
        """The modules whose own switch says that they run inside of a checkpoint (transformers, timm)."""
        switches = ("gradient_checkpointing", "grad_checkpointing")
        return frozenset(id(m) for m in self._model.modules() if any(m.__dict__.get(name) for name in switches))

    def _refuse_compiled(self) -> None:
        if self._enabled:
            raise ModelError(COMPILED)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._enabled or tracing.get():
            return
        if self._depth:
            self._recover()
        if self._depth == 0:  # both may refuse: before anything is pushed
            if self.before_forward is not None:
                self.before_forward()
            self._compilers.begin()
        self._depth += 1
        if self._depth > 1:
            return
        self._outermost = sys._getframe(2)
        plan = self._plans.get(self._model.training)
        name = self._names.get(id(module), "?")
        span = plan.spans.get(name) if plan is not None else None
        # A hook that was added after the trace may read what fusion would have overwritten; a backward hook
        # is to see the gradient of its own module.
        newest, backward = self._hooks_now()
        known = plan is not None and span is not None and newest <= self._newest_hook and not backward
        # What a checkpoint that was switched on since the trace computes anew must not be overwritten.
        known = known and self._checkpointing_now() <= self._switched_on
        self._section = current_section()
        self._plan, self._at_risk = (plan if known else None), False
        self._here = self._segments.get(self._model.training, {}) if known else {}
        self._writing, self._wrote = None, False
        self._span = span if span is not None and name else (0, sys.maxsize)
        self._cursor = self._span[0]
        self.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            unfinished, self._outermost, self._writing = self._writing is not None, None, None
            self.__exit__(None, None, None)
            self._compilers.end()
            if unfinished and output is not None:  # what was written down has not been computed
                raise self._departed(None)
            if self._wrote and self.prepare_call is None and any(_is_stand_in(t) for t in tree_iter(output)):
                raise ModelError(_STANDS_IN)

    def _recover(self) -> None:
        """Take the mode off that a forward pass has left behind: hooks do not run on Ctrl-C."""
        if self._depth and self._is_abandoned():
            self._depth, self._outermost = 0, None
            self._compilers.end()
            above = []
            while self in _get_current_function_mode_stack():
                mode = _pop_mode()
                if mode is not self:
                    above.append(mode)
            for mode in reversed(above):
                _push_mode(mode)

    def _is_abandoned(self) -> bool:
        """Whether the outermost call has ended without a word: only a frame that runs refuses to be cleared."""
        try:
            if self._outermost is not None:
                self._outermost.clear()
        except RuntimeError:
            return False
        return True

    # -- calls -------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            torch.compiler.disable(self._refuse_compiled)()
        if is_metadata(func):
            return self._asked(func, args, kwargs)
        if transposes_weight(func, args):
            return transposed(func, args, kwargs)
        if func in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[func](*args, **kwargs)
        func, args, kwargs = canonical(func, args, kwargs)
        token = internal_query.set(True)
        try:
            return self._called(func, args, kwargs)
        finally:
            internal_query.reset(token)

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.prepare_call is not None:
            args, kwargs = self.prepare_call(func, args, kwargs)
        if is_count(func, args, self._counters):
            return args[0]
        tensors = list(tensors_among((*args, *kwargs.values())))
        if not tensors or self._is_abandoned():
            return func(*args, **kwargs)
        if func in READS_ONE and id(tensors[0]) in self._counters:
            return batches_counted(func, tensors[0])
        place = self._outside_new_checkpoints(self._place(func, tensors))
        writing = self._writing or self._begins(place)
        if writing is not None:
            if place is None or place in writing.segment.aside:
                return func(*args, **kwargs)
            writing.skip_to(place)
            self._writing, self._wrote = writing, True
            out = writing.write(func, args, kwargs)
            if place == writing.segment.last:
                self._writing, self._programs[writing.segment] = None, writing.program
            return out
        return self._compute(func, args, kwargs, self._action(place), False)

    def _compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], action: Action | None, graph_only: bool
    ) -> Any:
        """Compute one call; ``graph_only`` where nobody reads its values."""
        if isinstance(action, Done):
            self._at_risk = True
            return args[0] if args else kwargs["input"]
        if isinstance(action, Leave):
            return func(*args, **kwargs)
        call = recognize(func, args, kwargs)
        handler = None if call is None else _HANDLERS.get(type(call))
        if handler is None:
            return func(*args, **kwargs)
        self._graph_only = graph_only
        out = handler(self, call, action)
        return func(*args, **kwargs) if out is None else out

    def _begins(self, place: int | None) -> DeferredSegment | None:
        """Begin to write down a segment if one begins here, all of it inside of the module that was called."""
        segment = None if place is None else self._here.get(place)
        if segment is None or self._plan is None or not self._span[0] <= segment.start < segment.end <= self._span[1]:
            return None
        before = self._programs.get(segment)
        return DeferredSegment(segment, self._plan.steps, self._compute, self._trained, before)

    def _trained(self, weight: int) -> tuple[str, Tensor] | None:
        armed = self._layers.get(weight)
        return None if armed is None or armed.leaf is None or armed.selected is None else (armed.name, armed.leaf)

    def _asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer what the model wants to know of a tensor, maybe of one that stands for one still to be computed."""
        writing = self._writing
        if writing is not None and args and isinstance(args[0], Tensor) and writing.program.knows(args[0]):
            device = writing.program.device
            if device is not None and device.type == "meta":
                device = None  # who simulates the step answers
            answer = None if device is None else answer_about_device(func, device)
            if answer is not None:
                return answer
        if not internal_query.get():
            return func(*args, **kwargs)
        token = internal_query.set(False)  # a section that is recomputed inside of a backward pass
        try:
            return func(*args, **kwargs)
        finally:
            internal_query.reset(token)

    def _action(self, place: int | None) -> Action | None:
        """What the plan says of a call; what reaches beyond the module that was called is computed call by call."""
        if place is None or self._plan is None:
            return None
        step = self._plan.steps[place]
        return step.action if self._span[0] <= step.first and step.last < self._span[1] else None

    def _place(self, function: Any, tensors: list[Tensor]) -> int | None:
        """The call of the plan that this one is; ``None`` where it is not in the plan."""
        plan = self._plan
        if plan is None:
            return None
        parameters = tuple(id(p) for p in map(shown_parameter, tensors) if isinstance(p, nn.Parameter))
        if self._writing is not None:
            return self._place_in_segment(plan, self._writing, function, tensors, parameters)
        if self._is_next(plan, self._cursor, function, parameters):
            self._cursor += 1
            return self._cursor - 1
        if self._at_risk:
            raise self._departed(function)
        # Nothing was put off or overwritten so far: calls may be missing or more (a mask that is only made for
        # padded batches), as long as the path comes back.
        if parameters:
            for place in range(self._cursor, len(plan.steps)):
                if self._is_next(plan, place, function, parameters):
                    self._cursor = place + 1
                    return place
            self._plan = None
        return None

    def _place_in_segment(
        self,
        plan: FusionPlan,
        writing: DeferredSegment,
        function: Any,
        tensors: list[Tensor],
        parameters: tuple[int, ...],
    ) -> int | None:
        """The same while a segment is written down: what is made of ids and masks alone may be missing or more."""
        belongs = bool(parameters) or any(writing.program.knows(t) for t in tensors)
        place = self._cursor
        while place in writing.segment.aside and (belongs or not self._is_next(plan, place, function, parameters)):
            place += 1
        if self._is_next(plan, place, function, parameters):
            self._cursor = place + 1
            return place
        if belongs or self._at_risk:
            raise self._departed(function)
        return None

    def _outside_new_checkpoints(self, place: int | None) -> int | None:
        """Leave the plan where a call runs inside of a checkpoint that the trace did not see."""
        if place is None or self._plan is None or not self._plan.steps[place].own:
            return place
        (hooks, gradients), (hooks_before, gradients_before) = current_section(), self._section
        if hooks == hooks_before and gradients >= gradients_before:
            return place
        if self._at_risk or self._writing is not None:
            self._plan, self._writing = None, None
            raise ModelError(_CHECKPOINTED_SINCE)
        self._plan = None
        return None

    @staticmethod
    def _is_next(plan: FusionPlan, place: int, function: Any, parameters: tuple[int, ...]) -> bool:
        if place >= len(plan.steps):
            return False
        step = plan.steps[place]
        return bool(step.function == function) and step.parameters == parameters

    def _departed(self, function: Any) -> ModelError:
        """Say that ``function``, or the end if it is ``None``, is not what comes next."""
        plan, self._plan, self._writing = self._plan, None, None
        came = "ended" if function is None else f"called {getattr(function, '__name__', str(function))}"
        expected = "the end" if plan is None else self._expected(plan)
        return ModelError(
            f"the forward pass took another path than the traced one: it {came} where {expected} was "
            "expected. If the model's forward depends on data, random choices or outside state, pass fuse=False "
            "to trady.prepare; if it depends on the kind of batch, prepare with an example of that kind."
        )

    def _expected(self, plan: FusionPlan) -> str:
        if self._cursor >= len(plan.steps):
            return "the end"
        function = plan.steps[self._cursor].function
        return getattr(function, "__name__", str(function))

    def _layer(self, call: WeightCall, action: Action | None) -> Tensor | None:
        if not isinstance(call.weight, nn.Parameter) or id(call.weight) in self._plain:
            return None
        armed = self._layers.get(id(call.weight))
        if any_trains(call.weight, call.bias):
            if isinstance(action, WithLayer):
                raise ModelError(_MADE_TRAINABLE)
            return None
        quantized = call.layer or (None if armed is None or isinstance(armed.truth, DenseWeight) else armed.truth)
        if quantized is None and is_quantized(call.weight):
            return frozen_linear(call.x, call.weight, call.bias) if call.operator.kind == "linear" else None
        fused = action if isinstance(action, WithLayer) else WithLayer()
        if fused.norm is not None and any_trains(fused.norm.weight, fused.norm.bias):
            raise ModelError(_MADE_TRAINABLE)
        operator, x = call.operator, call.x
        if isinstance(operator, Convolution):
            x = x if x.dim() == call.weight.dim() else x.unsqueeze(0)
            if fused.pad:
                operator = with_padding(operator, fused.pad)
        elif x.dim() == 1:
            x = x.unsqueeze(0)
        scale, shift = (None, None) if fused.norm is None else self._norms.of(fused.norm)
        self._at_risk |= fused.norm is not None or fused.clamp is not None or bool(fused.pad)
        selected = None if armed is None else armed.selected
        options = LayerCall(operator, selected, fused.clamp, _autocast_dtype(x), self._graph_only)
        with labelled(fused.operation or operator.kind):
            leaf = armed.leaf if armed is not None else None
            if quantized is not None:
                out = quantized_linear(x, leaf, options, quantized)
            else:
                out = layer(x, leaf, options, call.weight, call.bias, scale, shift)
        if self.on_layer is not None and armed is not None:
            self.on_layer(armed.name)
        return out if x.dim() == call.x.dim() else out.squeeze(0)

    def _steps(self, call: RecurrentCall, action: Action | None) -> tuple[Tensor, ...] | None:
        if not isinstance(call.weight, nn.Parameter) or id(call.weight) in self._plain:
            return None
        if any_trains(call.weight, call.bias, call.projection):
            raise ModelError(_MADE_TRAINABLE)
        armed = self._layers.get(id(call.weight))
        selected, leaf = (None, None) if armed is None else (armed.selected, armed.leaf)
        options = RecurrentOptions(call.steps, selected, isinstance(action, InPlace) and action.overwrite)
        with labelled(call.steps.cell):
            out = recurrent(call.x, call.states, leaf, options, call.weight, call.bias, call.projection)
        if self.on_layer is not None and armed is not None:
            self.on_layer(armed.name)
        return out

    def _activation(self, call: ActivationCall, action: Action | None) -> Tensor | None:
        planned = isinstance(action, InPlace) and action.overwrite
        if not call.x.is_floating_point():
            return None
        if call.in_place and not planned and not (_is_plain(call.x) and is_dense(call.x)):
            return None
        self._at_risk |= planned
        with labelled(call.clamp.name):
            return clamp(call.x, call.clamp, in_place=planned or call.in_place)

    def _norm(self, call: NormCall, action: Action | None) -> Tensor | None:
        if any(p is not None and id(p) in self._plain for p in (call.weight, call.bias)):
            return None
        if any_trains(call.weight, call.bias):
            raise ModelError(_MADE_TRAINABLE)
        scale, shift = self._norms.of(call)
        kind = action if isinstance(action, InPlace) else InPlace(False)
        self._at_risk |= kind.overwrite or kind.clamp is not None
        with labelled("batch_norm" if kind.clamp is None else f"batch_norm+{kind.clamp.name}"):
            return affine_clamp(call.x, scale, shift, kind.clamp, in_place=kind.overwrite)

    def _max_pool(self, call: MaxPoolCall, action: Action | None) -> Tensor:
        with labelled("max_pool"):
            return max_pool(call.x, call.window)

    def _average_pool(self, call: AveragePoolCall, action: Action | None) -> Tensor:
        with labelled("average_pool"):
            return average_pool(call.x, call.pool, call.gradient)

    def _dropout(self, call: DropoutCall, action: Action | None) -> Tensor:
        with labelled("dropout"):
            return dropout(call.x, call.probability)

    def _smooth(self, call: SmoothCall, action: Action | None) -> Tensor | None:
        if self.fidelity == "exact" or not (torch.is_grad_enabled() and call.x.requires_grad):
            return None
        if call.in_place and not (_is_plain(call.x) and is_dense(call.x)):
            return None
        # What the backward pass computes anew lives for a moment only: there is nothing to gain by rounding it.
        bits = bits_for(call.kind, self.fidelity)[0] if torch._C._current_graph_task_id() == -1 else None
        if bits is None or not pays(call.x, call.kind):
            return None
        with labelled(call.kind.name):
            return smooth(call.x, call.kind, bits, in_place=call.in_place)

    def _loss(self, call: LossCall, action: Action | None) -> Tensor | None:
        with labelled("cross_entropy"):
            return call.lean("mean" if call.mean else "sum")


_HANDLERS: dict[type, Callable[[Interceptor, Any, Action | None], Tensor | tuple[Tensor, ...] | None]] = {
    WeightCall: Interceptor._layer,
    RecurrentCall: Interceptor._steps,
    NormCall: Interceptor._norm,
    ActivationCall: Interceptor._activation,
    MaxPoolCall: Interceptor._max_pool,
    AveragePoolCall: Interceptor._average_pool,
    DropoutCall: Interceptor._dropout,
    SmoothCall: Interceptor._smooth,
    LossCall: Interceptor._loss,
}


_MADE_TRAINABLE = (
    "a parameter of the model was made trainable after it had been prepared: name its module as head=... in "
    "trady.prepare, or set requires_grad_(False) again"
)

_STANDS_IN = (
    "the model handed out an activation that it had let go in the traced forward pass, and that is only computed in "
    "the backward pass: prepare with an example that asks for it too (output_attentions=True, for instance), or pass "
    'recompute="none" to trady.prepare'
)

_CHECKPOINTED_SINCE = (
    "gradient checkpointing was switched on after the model had been prepared: switch it on first, then call "
    "trady.prepare"
)


def _is_stand_in(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def any_trains(*parameters: Tensor | None) -> bool:
    """Whether any of the parameters requires a gradient."""
    return any(p is not None and p.requires_grad for p in parameters)


@contextmanager
def labelled(operation: str) -> Iterator[None]:
    """Context in which what is saved is accounted to an operation."""
    token = current_operation.set(operation)
    try:
        yield
    finally:
        current_operation.reset(token)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and not x._is_view() and not (x.is_leaf and x.requires_grad)


@lru_cache(maxsize=4096)
def with_padding(operator: Convolution, pad: tuple[int, ...]) -> Convolution:
    """Move padding that was put off into the convolution: for free where both sides are equal."""
    dimensions = len(operator.stride)
    full = [*pad, *(0,) * (2 * dimensions - len(pad))]
    sides = [(full[2 * d], full[2 * d + 1]) for d in reversed(range(dimensions))]
    if not operator.pad and all(before == after for before, after in sides):
        padding = tuple(p + before for p, (before, _) in zip(operator.padding, sides, strict=True))
        return replace(operator, padding=padding)
    inner = operator.pad or (0,) * (2 * dimensions)
    return replace(operator, pad=tuple(a + b for a, b in zip(full, inner, strict=True)))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
