"""Routes a model's own calls to the lean operations while its forward pass runs.

A function mode is pushed by a forward hook on the outermost module that is called and popped when it returns or raises,
so that classes, keys and ``print(model)`` stay as they are. Calls are followed along the traced ones; where they leave
the trace after something was fused or overwritten, the forward pass is stopped rather than computed wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from trady.analysis.fusion import FusionPlan
from trady.analysis.segments import NO_SEGMENTS, Segments
from trady.calls.mode import CallMode
from trady.calls.questions import answer_about_device, is_metadata
from trady.errors import ModelError
from trady.interception.bound_modules import BoundModules
from trady.interception.deferred_segment import DeferredSegment, refuse_fakes
from trady.interception.follower import action_at, called_inside, departed, entered, left, place_of, segment_at
from trady.interception.forward_state import ForwardState
from trady.interception.frozen_norms import FrozenNorms
from trady.interception.handlers import Handlers
from trady.interception.layer import ArmedLayer
from trady.interception.module_hooks import ModuleHooks
from trady.interception.places import Place, bind
from trady.interception.program import Program
from trady.interception.shown_weights import ShownWeights
from trady.model.batch import tensors_among, way_of_calling
from trady.model.eager import COMPILED, CompilersOff, is_written_down
from trady.model.hooks import Watchers
from trady.model.mode import ByMode, tracing
from trady.model.parameters import own_parameters
from trady.model.prepared import has_weights
from trady.ops.context import internal_query
from trady.ops.frozen_norm import FrozenNorm
from trady.trace.batch_counters import READS_ONE, batch_counters, batches_counted, is_count

_ADD = Tensor.add_

#: Changes the arguments of a call before anything else is done with it.
PrepareCall = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Interceptor(CallMode):
    """Computes a model's forward pass with the lean operations.

    Args:
        model: The model; only its hooks are touched.
        layers: The layers that can be updated by channel.
        plans: The expected calls in training (True) and in evaluation mode (False).
        head: Identities of parameters that train through PyTorch's own backward.
        segments: What is recomputed in the backward pass, in training and in evaluation mode.
        fidelity: ``exact``, or the bits in which smooth activations keep their derivative
            (trady.ops.smooth.FIDELITIES).
        before_forward: Called with the module and its arguments before every forward pass; what it raises refuses
            the pass, and a pass for which it returns false is left to PyTorch.
        after_forward: Called with the module and what it returned.
        weights: The weights as they are shown between forward passes.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ArmedLayer],
        plans: ByMode[FusionPlan],
        head: set[int],
        segments: Segments = NO_SEGMENTS,
        *,
        fidelity: str = "exact",
        before_forward: Callable[[nn.Module, Any, Any], bool] = lambda *call: True,
        after_forward: Callable[[nn.Module, Any], None] = lambda *returned: None,
        weights: ShownWeights | None = None,
    ) -> None:
        super().__init__()
        self._model, self._plans = model, plans
        self._before_forward, self._after_forward = before_forward, after_forward
        self._weights = weights or ShownWeights(())
        self._handlers = Handlers(layers, head, FrozenNorms(model), fidelity)
        #: By segment.
        self._programs: dict[int, Program] = {}
        #: By plan, what was decided of each place; one more behind the last.
        self._places: dict[int, list[Place | None]] = {}
        self.recompute(segments)
        self._counters = batch_counters(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._own = {id(parameter) for parameter in own_parameters(model)}
        self._hooks: ModuleHooks | None = None
        self._bound: BoundModules | None = None
        self._hears_modules = any(plan is not None and plan.decisions for plan in map(plans.of, (True, False)))
        self._compilers = CompilersOff()
        self._enabled = True
        self._prepare_call: PrepareCall | None = None
        self._forward: ForwardState | None = None

    def recompute(self, segments: Segments) -> None:
        """Keep only the inputs of these segments, from the next forward pass on."""
        self._places.clear()
        self._programs.clear()
        self._segments = segments.map(lambda chosen: {segment.first: segment for segment in chosen})

    def simulate(self, prepare_call: PrepareCall, on_layer: Callable[[str, Tensor], None]) -> None:
        """Run forward passes for a simulator from now on.

        Args:
            prepare_call: Changes the arguments of a call before anything else is done with it. The model may
                hand out fake tensors.
            on_layer: Called with the name and the result of every layer that has been computed.

        """
        self._prepare_call = prepare_call
        self._handlers.watch(on_layer)

    def keep_norms(self, norms: Iterable[FrozenNorm]) -> None:
        """Compute the scales and shifts of frozen normalisations now, as they are there after a first pass."""
        for norm in norms:
            self._handlers.norms.scale_and_shift(norm)

    # -- arming ------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Hang the hooks in."""
        call = self._enter, self._leave, self._refuse_compiled
        self._hooks = ModuleHooks(self._model, *call, all_ends=self._hears_modules)
        self._bound = BoundModules(self._model, self._hooks, lambda: self._forward, self._recover)
        self._watchers = Watchers(self._model)

    def disarm(self) -> None:
        """Take the hooks out again; let go of what was kept from pass to pass."""
        self._recover()
        if self._hooks is not None:
            self._hooks.remove()
        self._handlers.norms.forget()
        self._programs.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the model to PyTorch for a while: its own inference, untouched."""
        self._enabled = False
        self._weights.hide()
        try:
            yield
        finally:
            self._enabled = True
            if self._forward is None:
                self._weights.show()

    def _refuse_compiled(self) -> None:
        if self._enabled:
            raise ModelError(COMPILED)

    # -- one forward pass --------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._enabled or tracing.get() or (self._forward is None and is_written_down()):
            return
        self._recover()
        if (forward := self._forward) is not None:
            if self._hears_modules or module is forward.module:
                forward.depth += 1
            if self._hears_modules:
                entered(forward, self._names.get(id(module), "?"))
            return
        if not has_weights(module) and torch._C._current_graph_task_id() == -1:
            return  # it may be running in another model, which shares it; in a backward pass a checkpoint runs again
        if any(isinstance(mode, Interceptor) and mode is not self for mode in _get_current_function_mode_stack()):
            raise called_inside()
        self._weights.hide()
        goes_on = False
        try:  # this and the next may refuse: before anything is pushed
            goes_on = self._before_forward(module, args, kwargs)
            if goes_on:
                self._handlers.norms.follow()
                self._compilers.begin()
        finally:
            if not goes_on:
                self._weights.show()
        if not goes_on:
            return
        plan = self._plans.of(self._model.training)
        name = self._names.get(id(module), "?")
        span = plan.spans.get(name) if plan is not None else None
        # A hook that was added after the trace may read what fusion would have overwritten; a backward hook
        # is to see the gradient of its own module.
        known = plan is not None and span is not None and self._watchers.are_known(plan.hooks)
        # Generation, prediction without labels, an encoder on its own: other passes than the one that was traced.
        if known and plan is not None and not torch.is_grad_enabled():
            known = not name and plan.way == way_of_calling(args, kwargs)
        if self._hooks is not None:
            self._hooks.hear_end(module)
        self._forward = ForwardState(
            module=module,
            outermost=sys._getframe(2),
            plan=plan if known else None,
            own=self._own,
            span=span if span is not None and name else (0, sys.maxsize),
            modules=[name],
            segments=(self._segments.of(self._model.training) or {}) if known else {},
            places=self._places_of(plan) if known and not name and plan is not None else None,
        )
        self.__enter__()
        if self._bound is not None and self._forward.places is not None and not self._hears_modules:
            self._bound.begin()

    def _places_of(self, plan: FusionPlan) -> list[Place | None] | None:
        """What was decided of the places of a plan; ``None`` where every call must be asked."""
        if self._prepare_call is not None:
            return None
        return self._places.setdefault(id(plan), [None] * (len(plan.steps) + 1))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forward
        if forward is None or not (self._hears_modules or module is forward.module):
            return
        forward.depth -= 1
        if forward.depth:
            if self._hears_modules:
                left(forward, self._names.get(id(module), "?"))
            return
        if self._bound is not None:
            self._bound.end()
        self._forward = None
        unfinished, forward.outermost, forward.writing = forward.writing is not None, None, None
        self.__exit__(None, None, None)
        self._compilers.end()
        self._weights.show()
        if unfinished and output is not None:  # what was written down has not been computed
            raise departed(forward, None)
        if forward.wrote and self._prepare_call is None:
            refuse_fakes(output)
        self._after_forward(module, output)

    def _recover(self) -> None:
        """Take the mode off that a forward pass has left behind: hooks do not run on Ctrl-C."""
        abandoned = self._forward is not None and self._forward.abandoned
        if self._bound is not None and (abandoned or self._forward is None):
            self._bound.end()
        if abandoned:
            self._forward = None
            self._compilers.end()
            above = []
            while self in _get_current_function_mode_stack():
                mode = _pop_mode()
                if mode is not self:
                    above.append(mode)
            for mode in reversed(above):
                _push_mode(mode)

    # -- calls -------------------------------------------------------------------------------------

    def compiling(self) -> None:
        """Refuse: compiled calls cannot be intercepted."""
        torch.compiler.disable(self._refuse_compiled)()

    def asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer what the model wants to know of a tensor, maybe of a fake one whose values are still to come."""
        writing = None if self._forward is None else self._forward.writing
        if writing is not None and args and isinstance(args[0], Tensor) and writing.knows(args[0]):
            device = writing.device
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

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what was decided of this call when it came here before; else read it."""
        forward = self._forward
        if forward is not None and (places := forward.places) is not None:
            if func is _ADD and args and id(args[0]) in self._counters:
                return args[0]
            place = places[forward.cursor]
            if forward.writing is None and place is not None and place.function is func:
                keywords = kwargs or {}
                if (not kwargs and place.types == tuple(map(type, args))) or place.fits(args, keywords):
                    module = place.module
                    if module is None or (not forward.lost and module == forward.modules[-1]):
                        if place.compute is None:
                            forward.cursor += 1
                            return func(*args, **keywords)
                        if forward.is_in_section and not forward.abandoned:
                            out = forward.as_before(place, args, keywords)
                            if out is not NotImplemented:
                                return out
            elif is_metadata(func):
                return self.asked(func, args, kwargs or {})
            elif forward.writing is not None:
                return self._write_again(forward, forward.writing, func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _write_again(
        self,
        forward: ForwardState,
        writing: DeferredSegment,
        func: Any,
        types: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
    ) -> Any:
        """Write a call down as it was in the pass before, if it is the one that comes next."""
        if forward.cursor == writing.next_call and forward.is_in_section and not forward.abandoned:
            out = writing.write_again(func, args, kwargs or {})
            if out is not NotImplemented:
                forward.cursor += 1
                if forward.cursor > writing.last:
                    forward.writing, self._programs[id(writing.segment)] = None, writing.program
                return out
        return super().__torch_function__(func, types, args, kwargs)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call as the plan wants it, or write it down."""
        token = internal_query.set(True)
        try:
            return self._call(func, args, kwargs)
        finally:
            internal_query.reset(token)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._prepare_call is not None:
            args, kwargs = self._prepare_call(func, args, kwargs)
        if is_count(func, args, self._counters):
            return args[0]
        tensors = list(tensors_among((*args, *kwargs.values())))
        forward = self._forward
        if not tensors or forward is None or forward.abandoned:
            return func(*args, **kwargs)
        if func in READS_ONE and id(tensors[0]) in self._counters:
            return batches_counted(func, tensors[0])
        place = place_of(forward, func, tensors)
        writing = forward.writing or self._begin(forward, place)
        if writing is None:
            return self._compute(forward, place, func, args, kwargs)
        if place is None or place in writing.segment.auxiliary:
            return func(*args, **kwargs)
        writing.skip_to(place)
        forward.writing, forward.wrote = writing, True
        out = writing.write(func, args, kwargs)
        if place == writing.last:
            forward.writing, self._programs[id(writing.segment)] = None, writing.program
        return out

    def _compute(
        self, forward: ForwardState, place: int | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a call, and leave in its place how it is computed."""
        action = action_at(forward, place)
        out = self._handlers.compute(func, args, kwargs, action, commit=forward.commit)
        if place is not None and forward.plan is not None and forward.places is not None:
            decided = place in forward.plan.decisions
            rest = (func, args, kwargs, forward.plan, place, self._handlers, self._commit)
            forward.places[place] = None if decided else bind(*rest)
        return out

    def _commit(self) -> None:
        if self._forward is not None:
            self._forward.commit()

    def _begin(self, forward: ForwardState, place: int | None) -> DeferredSegment | None:
        """Begin to write down a segment if one begins here."""
        segment = segment_at(forward, place)
        if segment is None or forward.plan is None:
            return None
        known = self._programs.get(id(segment))
        return DeferredSegment(segment, forward.plan.steps, self._handlers, self._commit, known)
