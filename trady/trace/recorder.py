"""Records one forward pass on the meta device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.calls.autocast import cast_where_simulated
from trady.calls.canonical import untransposed
from trady.calls.kinds import Call, RecurrentCall
from trady.calls.mode import CallMode
from trady.calls.names import name_of
from trady.calls.questions import answer_about_device, draws_numbers
from trady.calls.recognize import kind_of, recognize, run_on_meta
from trady.errors import ModelError
from trady.model.batch import (
    Batch,
    numbers_among,
    tensors_among,
    way_of_calling,
    without_memory,
)
from trady.model.eager import COMPILED, uncompiled
from trady.model.hooks import forward_hooks
from trady.model.mode import Section, current_section, tracing
from trady.model.parameters import own_parameters
from trady.model.python_state import PythonState
from trady.model.structure import is_sparse, with_tensors
from trady.model.untouched import switch_mode, unseen, untouched
from trady.quantized.linear import routed
from trady.trace.answers import Answers, Replay
from trady.trace.batch_counters import READS_ONE, batch_counters, batches_counted, is_count
from trady.trace.custom_functions import in_custom_function
from trady.trace.draws import Draws, Watch
from trady.trace.trace import Trace, TracedCall, Value


class NeedsValuesError(Exception):
    """A model looks at values that fake tensors have not."""


def record(
    model: nn.Module,
    batch: Batch,
    training: bool | None,
    *,
    draws: Draws,
    answers: Answers | None = None,
    watching: bool = False,
    rounds: int = 0,
) -> Trace:
    """Run a model on shapes alone; it is untouched afterwards (:func:`trady.model.untouched.untouched`).

    Args:
        model: Any module; its weights may lie on any device, also on meta.
        batch: One batch as training will see it.
        training: Training or evaluation mode; ``None`` keeps the model's own mode.
        draws: What random numbers are.
        answers: What the model is told where it looks at values.
        watching: Whether to note when Python's or NumPy's random numbers are drawn, which costs time.
        rounds: Passes that the model makes before, for what it keeps in Python.

    Raises:
        NeedsValuesError: The model looks at values, and has been told none.

    """
    args, kwargs = batch.arguments
    with pass_of_ours(model, batch, training, draws) as watch:
        for _ in range(rounds):
            before = _Recorder(model, batch.device_in(model), None if answers is None else Replay(answers.all), None)
            _run(before, model, args, kwargs)
        recorder = _Recorder(model, batch.device_in(model), answers, watch if watching else None)
        with unseen():
            state = PythonState([model])
        with _module_spans(model, recorder):
            output = _run(recorder, model, args, kwargs)
        if recorder.needs_values and answers is None:
            raise NeedsValuesError
        trace = recorder.trace
        trace.hooks = forward_hooks(model)
        trace.draws, trace.words = draws, watch.words() if recorder.decides_at_random else 0
        trace.host_words = watch.host_words()
        with unseen():
            trace.rounds, trace.keeps_state = rounds, state.changed
        # What the output and the model's attributes hold shows before the attributes are put back.
        outputs = list(tree_iter(output))
        recorder.settle()
        del outputs
    trace.batch, trace.way = batch.samples, way_of_calling(*batch.arguments)
    trace.answers = () if answers is None else answers.all
    return trace


def _run(recorder: _Recorder, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with recorder:
            args, kwargs = with_tensors((args, kwargs), recorder.without_values)
            return model(*args, **kwargs)
    except ModelError:
        raise
    except Exception as error:
        raise NeedsValuesError from error


@contextmanager
def pass_of_ours(model: nn.Module, batch: Batch, training: bool | None, draws: Draws) -> Iterator[Watch]:
    """Context for a forward pass that the user has not asked for, without a graph of its own."""
    with ExitStack() as stack:
        stack.enter_context(untouched(model, batch.inputs))
        stack.enter_context(uncompiled(model))
        if training is not None:
            switch_mode(model, training)
        stack.enter_context(routed(model))
        # The twins of parameters and inputs need no gradient, so no graph is made; what switches gradients off
        # (custom functions, checkpoints) shows.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # this pass is ours: the model's own will warn
        stack.callback(tracing.reset, tracing.set(True))
        yield draws.arm([model, batch.inputs])


def _refuse_compiled() -> None:
    raise ModelError(COMPILED)


class _Settled:
    """Stands for a weak reference after the trace: whether the tensor was still held."""

    def __init__(self, alive: bool) -> None:
        self._alive = self if alive else None

    def __call__(self) -> Any:
        return self._alive


def _settle(value: Value) -> Value:
    return replace(value, reference=_Settled(value.reference() is not None))  # type: ignore[arg-type]


class _Recorder(CallMode):
    """Writes down every call, and does it on fake tensors."""

    def __init__(
        self, model: nn.Module, device: torch.device | None, answers: Answers | None, watch: Watch | None
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self.needs_values = self.decides_at_random = False
        self._answers, self._watch = answers, watch
        self._drawn: dict[int, weakref.ref[Tensor]] = {}
        self._lately_gone: list[Value] = []
        self._device = device
        self.containers: list[str] = [""]
        self.modules: list[str] = [""]
        self.sections: list[Section] = [current_section()]
        self._own: dict[int, Tensor] = {id(t): t for t in [*own_parameters(model), *model.buffers()]}
        self._counters = batch_counters(model)
        self._meta: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._current: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def to_meta(self, value: Any) -> Any:
        """Replace a tensor by a fake one without gradient; the same tensor always by the same one."""
        if isinstance(value, torch.device):
            return _META
        if not isinstance(value, Tensor) or (value.is_meta and not value.requires_grad):
            return value
        known = self._meta.get(id(value))
        if known is None or known[0]() is not value:
            with torch._C.DisableTorchFunction():
                twin = without_memory(value)
            known = self._meta[id(value)] = (weakref.ref(value), twin)
        return known[1]

    def without_values(self, value: Any) -> Any:
        """Replace an input by a fake tensor; ids and masks stay: models look at their values."""
        keep = (isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())) or is_sparse(value)
        return value if keep else self.to_meta(value)

    def settle(self) -> None:
        """End: what is there now was there in the end."""
        self.trace.values = [_settle(value) for value in self.trace.values]
        self._current.clear()  # with the weak references, which would tell of what ends later

    def compiling(self) -> None:
        """Refuse: compiled calls cannot be written down."""
        torch.compiler.disable(_refuse_compiled)()

    def asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note who asks; a question about the device is answered for the real one."""
        for value in map(self._value_of, tensors_among((*args, *kwargs.values()))):
            if value is not None:
                self.trace.values[value].shape_readers.append(len(self.trace.calls))
        answer = None if self._device is None else answer_about_device(func, self._device)
        return func(*args, **kwargs) if answer is None else answer

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write a call down and do it on fake tensors."""
        tensors = list(tensors_among((*args, *kwargs.values())))
        index = len(self.trace.calls)
        if is_count(func, args, self._counters):
            return args[0]
        if self._watch is not None and self._watch.moved():
            self._decides(index)
            self._watch.note()
        if not tensors:
            return self._noted(func, func(*args, **kwargs), drawn=draws_numbers(func, args, kwargs))
        if func in READS_ONE and id(tensors[0]) in self._counters:
            return batches_counted(func, tensors[0])
        call = recognize(func, args, kwargs)
        in_function = not torch.is_grad_enabled() and in_custom_function()
        sources = [untransposed(t) for t in tensors]
        reads = tuple(v for v in map(self._value_of, tensors) if v is not None)
        for value in reads:
            self.trace.values[value].readers.append(index)
        entry = TracedCall(
            function=func,
            call=None if call is None else _without_activations(call),
            reads=reads,
            makes=(),
            parameters=tuple(t for t in sources if id(t) in self._own),
            container=self.containers[-1],
            module=self.modules[-1],
            scope=self._scope(),
            input_shape=() if call is None else tuple(call.x.shape),
            numbers=tuple(numbers_among((*args, *kwargs.values()))),
            shapes=tuple(tuple(t.shape) for t in tensors),
            keywords={name: tuple(numbers_among((value,))) for name, value in kwargs.items()},
            in_function=in_function,
            without_gradient=not (in_function or torch.is_grad_enabled()),
            auxiliary=not any(t.is_meta or id(t) in self._own for t in sources),
        )
        self.trace.calls.append(entry)
        places = [self._value_of(t) for t in tensors]
        touched = tensors if entry.auxiliary else [self.to_meta(t) for t in tensors]
        versions = [_version(t) for t in touched]
        if entry.auxiliary:
            drawn = draws_numbers(func, args, kwargs) or any(_is_in(self._drawn, tensor) for tensor in tensors)
            out = self._noted(func, func(*args, **kwargs), drawn=drawn)
        else:
            out = self._run_on_meta(func, args, kwargs, entry)
        changed = [_version(tensor) != version for tensor, version in zip(touched, versions, strict=True)]
        entry.written = tuple(place for place, new in zip(places, changed, strict=True) if new)
        # What writes into a weight or a buffer hands out that very one.
        same = {id(twin): t for t, twin, new in zip(tensors, touched, changed, strict=True) if new and twin is not t}
        if same:
            out = tree_map(lambda leaf: same.get(id(leaf), leaf), out)
        made = [t for t in tree_iter(out) if isinstance(t, Tensor) and id(t) not in self._own]
        entry.makes = tuple(self._register(t, index, tensors) for t in made)
        entry.output_shape = tuple(made[0].shape) if made else ()
        if isinstance(call, RecurrentCall):
            entry.input_shape, entry.output_shape = call.product_shapes
        return out

    def _run_on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entry: TracedCall) -> Any:
        args, kwargs = tree_map(self.to_meta, (args, kwargs))
        arguments = (*args, *kwargs.values())
        answer = None if self._answers is None else self._answers.to(func, arguments, lambda: self._origin(entry))
        if answer is not None:
            entry.looks = True
            if answer.decides:
                self.trace.decisions = (*self.trace.decisions, len(self.trace.calls))
            return answer.repeated(arguments)
        # Some models convert what has not the type of their weights: where they run under autocast, that shows.
        args, kwargs = cast_where_simulated(func, args, kwargs, "cpu" if self._device is None else self._device.type)
        try:
            return run_on_meta(func, args, kwargs)
        except Exception:
            self.needs_values = True  # if not, the pass on the example says what is wrong
            raise

    def _origin(self, entry: TracedCall) -> list[str]:
        """Names of the functions that have made what a call reads, the last one first."""
        names: list[str] = []
        while entry.reads:
            entry = self.trace.calls[self.trace.values[entry.reads[0]].producer]
            names.append(name_of(entry.function))
        return names

    def _noted(self, function: Any, out: Any, *, drawn: bool) -> Any:
        """Note where what was drawn at random goes to, until the model has a number to decide by."""
        if drawn:
            tensors = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
            self._drawn.update({id(tensor): weakref.ref(tensor) for tensor in tensors})
            if not tensors:
                self._decides(len(self.trace.calls))
        return out

    def _decides(self, position: int) -> None:
        self.decides_at_random = True
        self.trace.decisions = (*self.trace.decisions, position)

    def _scope(self) -> str | None:
        section, scope = current_section(), None
        for module, entered in zip(reversed(self.modules), reversed(self.sections), strict=True):
            if entered != section:
                break
            scope = module
        return scope

    def _value_of(self, tensor: Tensor) -> int | None:
        entry = self._current.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _gone(self, number: int) -> None:
        """Note that a value is no longer there; before numbers that were drawn meanwhile, if they have not yet been."""
        value = self.trace.values[number]
        if value.ended is None:
            early = self._watch is not None and not self._watch.moved()
            value.ended = len(self.trace.calls) - early / 2
            self._lately_gone.append(value)

    def left(self) -> None:
        """Note that a module has returned: what was gone by then is not there when its caller decides."""
        here = len(self.trace.calls)
        drawn = self._watch is not None and self._watch.moved()
        if not drawn and here not in self.trace.decisions[-1:]:
            for value in self._lately_gone:
                if value.ended == here:
                    value.ended = here - 0.5
        self._lately_gone.clear()

    def _register(self, tensor: Tensor, producer: int, arguments: list[Tensor]) -> int:
        old = self._value_of(tensor)
        if not any(t is tensor for t in arguments):
            old = None
        if old is not None:
            self.trace.values[old].replaced, self.trace.values[old].ended = True, producer + 1
        values, number = self.trace.values, len(self.trace.values)
        gone = weakref.ref(tensor, lambda _: self._gone(number))
        value = Value(producer, gone, tuple(tensor.shape), view=tensor._base is not None, same_as=old)
        values.append(value)
        self._current[id(tensor)] = (value.reference, len(values) - 1)
        return len(values) - 1


def _is_in(known: Mapping[int, weakref.ref[Tensor]], tensor: Tensor) -> bool:
    found = known.get(id(tensor))
    return found is not None and found() is tensor


def _version(tensor: Tensor) -> int:
    """How often a tensor has been written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _without_activations(call: Call) -> Call:
    """Drop the activations: the trace must not keep alive what the model lets go."""
    nothing: dict[str, Any] = dict.fromkeys(kind_of(call).activations)
    return replace(call, **nothing)


_META = torch.device("meta")


@contextmanager
def _module_spans(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    names = {id(module): name for name, module in model.named_modules()}
    starts: list[tuple[int, int]] = []

    def enter(module: nn.Module, args: Any) -> None:
        name = names.get(id(module))
        if name is None:
            return
        starts.append((id(module), len(recorder.trace.calls)))
        recorder.modules.append(name)
        recorder.sections.append(current_section())
        has_children = next(module.children(), None) is not None
        recorder.containers.append(name if has_children else recorder.containers[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        depth = next((d for d in reversed(range(len(starts))) if starts[d][0] == id(module)), None)
        if depth is None:
            return
        recorder.trace.spans.append((names[id(module)], starts[depth][1], len(recorder.trace.calls)))
        del starts[depth:]  # with the modules inside that raised
        recorder.left()
        for stack in (recorder.modules, recorder.sections, recorder.containers):
            del stack[depth + 1 :]

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()
