"""Routes a model's own calls to the lean operations while its forward pass runs.

A function mode is pushed by a forward hook on the outermost module that is called and popped
when it returns or raises, so that classes, keys and ``print(model)`` stay as they are. The calls are
followed along the traced ones; where they leave the trace after something was fused or overwritten,
the forward pass is stopped rather than computed wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_iter

from trady.analysis.fusion import FusionPlan
from trady.analysis.segments import NO_SEGMENTS, Segment, Segments
from trady.calls.mode import CallMode
from trady.calls.questions import answer_about_device
from trady.errors import ModelError
from trady.interception.deferred_segment import DeferredSegment
from trady.interception.follower import action_at, departed, entered, left, place_of, segment_at
from trady.interception.forward_state import ForwardState
from trady.interception.frozen_norms import FrozenNorms
from trady.interception.handlers import Handlers
from trady.interception.layer import ArmedLayer
from trady.interception.program import Program
from trady.model.batch import tensors_among, way_of_calling
from trady.model.eager import COMPILED, CompilersOff, is_written_down
from trady.model.hooks import Hook, forward_hooks
from trady.model.mode import ByMode, tracing
from trady.model.prepared import has_weights
from trady.ops.context import internal_query
from trady.ops.frozen_norm import FrozenNorm
from trady.trace.batch_counters import READS_ONE, batch_counters, batches_counted, is_count

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
    ) -> None:
        super().__init__()
        self._model, self._plans = model, plans
        self._before_forward, self._after_forward = before_forward, after_forward
        self._handlers = Handlers(layers, head, FrozenNorms(model), fidelity)
        self._programs: dict[Segment, Program] = {}
        self.recompute(segments)
        self._counters = batch_counters(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._handles: list[Any] = []
        self._newest_hook = 0
        self._switched_on: frozenset[int] = frozenset()
        self._compilers = CompilersOff()
        self._enabled = True
        self._prepare_call: PrepareCall | None = None
        self._forward: ForwardState | None = None

    def recompute(self, segments: Segments) -> None:
        """Keep only the inputs of these segments, from the next forward pass on."""
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
        """Hang the hooks into every module: a checkpointed segment is recomputed without the root."""
        for module in self._model.modules():
            enter, leave = Hook(self._enter, self._refuse_compiled), Hook(self._leave)
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._newest_hook, self._switched_on = self._newest_hook_now(), self._checkpointing_now()

    def disarm(self) -> None:
        """Take the hooks out again; let go of what was kept from pass to pass."""
        self._recover()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._handlers.norms.forget()
        self._programs.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the model to PyTorch for a while: its own inference, untouched."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def _newest_hook_now(self) -> int:
        """Index of the newest forward hook: they count up."""
        modules = self._model.modules()
        return max((index for m in modules for index in (*m._forward_hooks, *m._forward_pre_hooks)), default=0)

    def _knows_hooks(self, plan: FusionPlan) -> bool:
        """Whether all hooks that were hung in since the model was armed ran in the traced pass too."""
        if any(m._backward_hooks or m._backward_pre_hooks for m in self._model.modules()):
            return False
        newest = self._newest_hook_now()
        if newest > self._newest_hook and forward_hooks(self._model, self._newest_hook) <= plan.hooks:
            self._newest_hook = newest
        return newest <= self._newest_hook

    def _checkpointing_now(self) -> frozenset[int]:
        """The modules whose own switch says that they run inside of a checkpoint (transformers, timm)."""
        switches = ("gradient_checkpointing", "grad_checkpointing")
        return frozenset(id(m) for m in self._model.modules() if any(m.__dict__.get(name) for name in switches))

    def _refuse_compiled(self) -> None:
        if self._enabled:
            raise ModelError(COMPILED)

    # -- one forward pass --------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._enabled or tracing.get() or (self._forward is None and is_written_down()):
            return
        self._recover()
        if self._forward is not None:
            self._forward.depth += 1
            entered(self._forward, self._names.get(id(module), "?"))
            return
        if not has_weights(module) and torch._C._current_graph_task_id() == -1:
            return  # it may be running in another model, which shares it; in a backward pass a checkpoint runs again
        if not self._before_forward(module, args, kwargs):  # this and the next may refuse: before anything is pushed
            return
        self._compilers.begin()
        plan = self._plans.of(self._model.training)
        name = self._names.get(id(module), "?")
        span = plan.spans.get(name) if plan is not None else None
        # A hook that was added after the trace may read what fusion would have overwritten; a backward hook
        # is to see the gradient of its own module.
        known = plan is not None and span is not None and self._knows_hooks(plan)
        # What a checkpoint that was switched on since the trace recomputes must not be overwritten.
        known = known and self._checkpointing_now() <= self._switched_on
        # Generation, prediction without labels, an encoder on its own: other passes than the one that was traced.
        if known and plan is not None and not torch.is_grad_enabled():
            known = not name and plan.way == way_of_calling(args, kwargs)
        self._forward = ForwardState(
            outermost=sys._getframe(2),
            plan=plan if known else None,
            span=span if span is not None and name else (0, sys.maxsize),
            modules=[name],
            segments=(self._segments.of(self._model.training) or {}) if known else {},
        )
        self.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forward
        if forward is None:
            return
        forward.depth -= 1
        if forward.depth:
            left(forward, self._names.get(id(module), "?"))
            return
        self._forward = None
        unfinished, forward.outermost, forward.writing = forward.writing is not None, None, None
        self.__exit__(None, None, None)
        self._compilers.end()
        if unfinished and output is not None:  # what was written down has not been computed
            raise departed(forward, None)
        if forward.wrote and self._prepare_call is None and any(_is_fake(t) for t in tree_iter(output)):
            raise ModelError(_HANDED_OUT_FAKE)
        self._after_forward(module, output)

    def _recover(self) -> None:
        """Take the mode off that a forward pass has left behind: hooks do not run on Ctrl-C."""
        if self._forward is not None and self._forward.abandoned:
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
            return self._handlers.compute(func, args, kwargs, action_at(forward, place), commit=forward.commit)
        if place is None or place in writing.segment.auxiliary:
            return func(*args, **kwargs)
        writing.skip_to(place)
        forward.writing, forward.wrote = writing, True
        out = writing.write(func, args, kwargs)
        if place == writing.segment.last:
            forward.writing, self._programs[writing.segment] = None, writing.program
        return out

    def _begin(self, forward: ForwardState, place: int | None) -> DeferredSegment | None:
        """Begin to write down a segment if one begins here."""
        segment = segment_at(forward, place)
        if segment is None or forward.plan is None:
            return None
        compute = partial(self._handlers.compute, commit=forward.commit)
        before = self._programs.get(segment)
        return DeferredSegment(segment, forward.plan.steps, compute, self._handlers.trained, before)


_HANDED_OUT_FAKE = (
    "the model handed out an activation that it had let go in the traced forward pass, and that is only computed in "
    "the backward pass: prepare with an example that asks for it too (output_attentions=True, for instance), or pass "
    'recompute="none" to trady.prepare'
)


def _is_fake(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta
