"""Records one forward pass on the meta device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.calls.canonical import untransposed
from trady.calls.kinds import Call, RecurrentCall
from trady.calls.mode import CallMode
from trady.calls.questions import answer_about_device
from trady.calls.recognize import kind_of, recognize, run_on_meta
from trady.errors import ModelError
from trady.model.batch import (
    Batch,
    numbers_among,
    tensors_among,
    way_of_calling,
    without_memory,
)
from trady.model.eager import COMPILED, compiler_is_loaded, uncompiled
from trady.model.hooks import forward_hooks
from trady.model.mode import Section, current_section, tracing
from trady.model.parameters import own_parameters
from trady.model.structure import is_sparse, with_tensors
from trady.model.untouched import switch_mode, untouched
from trady.quantized.linear import routed
from trady.trace.batch_counters import READS_ONE, batch_counters, batches_counted, is_count
from trady.trace.trace import Trace, TracedCall, Value


def trace_forward(model: nn.Module, example: Batch | Any, *, training: bool | None = None) -> Trace:
    """Run ``model`` on shapes alone; it is untouched afterwards (:func:`trady.model.untouched.untouched`).

    Args:
        model: Any module; its weights may lie on any device, also on meta.
        example: One batch as training will see it: a tensor, a tuple (positional arguments) or a
            mapping (keyword arguments).
        training: Trace in training or evaluation mode; ``None`` keeps the model's own mode.

    Returns:
        The calls, values and module spans.

    Raises:
        ModelError: The model cannot run on the example, or its forward depends on the data.

    """
    known = compiler_is_loaded()
    try:
        return _trace(model, example, training)
    except ModelError:
        if known or not compiler_is_loaded():
            raise
        return _trace(model, example, training)  # the forward pass itself called torch.compile: now it can be told


def _trace(model: nn.Module, example: Batch | Any, training: bool | None) -> Trace:
    batch = Batch.of(example, model)
    args, kwargs = batch.arguments
    recorder = _Recorder(model, batch.device_in(model))
    with ExitStack() as stack:
        stack.enter_context(untouched(model, batch.inputs))
        stack.enter_context(uncompiled(model))
        if training is not None:
            switch_mode(model, training)
        stack.enter_context(routed(model))
        stack.enter_context(_module_spans(model, recorder))
        # The twins of parameters and inputs need no gradient, so no graph is made; what switches gradients off
        # (custom functions, checkpoints) shows.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # this pass is ours: the model's own will warn
        token = tracing.set(True)
        try:
            with recorder:
                args, kwargs = with_tensors((args, kwargs), recorder.without_values)
                output = model(*args, **kwargs)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be traced on the example batch ({batch.shapes}): "
                f"{type(error).__name__}: {error}. The example must be one batch as training will see it, and "
                "the forward pass must not branch on the values of tensors."
            ) from error
        finally:
            tracing.reset(token)
        recorder.trace.hooks = forward_hooks(model)
        # What the output and the model's attributes hold shows before the attributes are put back.
        outputs = list(tree_iter(output))
        recorder.trace.values = [_settle(value) for value in recorder.trace.values]
        del outputs
    recorder.trace.batch, recorder.trace.way = batch.samples, way_of_calling(args, kwargs)
    return recorder.trace


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

    def __init__(self, model: nn.Module, device: torch.device | None) -> None:
        super().__init__()
        self.trace = Trace()
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
        keep = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()) or is_sparse(value)
        return value if keep else self.to_meta(value)

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
        if not tensors:
            return func(*args, **kwargs)
        if func in READS_ONE and id(tensors[0]) in self._counters:
            return batches_counted(func, tensors[0])
        call = recognize(func, args, kwargs)
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
            auxiliary=not any(t.is_meta or id(t) in self._own for t in sources),
        )
        self.trace.calls.append(entry)
        places = [self._value_of(t) for t in tensors]
        touched = tensors if entry.auxiliary else [self.to_meta(t) for t in tensors]
        versions = [_version(t) for t in touched]
        out = func(*args, **kwargs) if entry.auxiliary else self._run_on_meta(func, args, kwargs)
        changed = [_version(tensor) != version for tensor, version in zip(touched, versions, strict=True)]
        entry.written = tuple(place for place, new in zip(places, changed, strict=True) if new)
        made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        entry.makes = tuple(self._register(t, index, tensors) for t in made)
        entry.output_shape = tuple(made[0].shape) if made else ()
        if isinstance(call, RecurrentCall):
            entry.input_shape, entry.output_shape = call.product_shapes
        return out

    def _run_on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run_on_meta(func, tree_map(self.to_meta, args), tree_map(self.to_meta, kwargs))

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

    def _register(self, tensor: Tensor, producer: int, arguments: list[Tensor]) -> int:
        old = self._value_of(tensor)
        if not any(t is tensor for t in arguments):
            old = None
        if old is not None:
            self.trace.values[old].replaced = True
        values = self.trace.values
        value = Value(producer, weakref.ref(tensor), tuple(tensor.shape), view=tensor._base is not None, same_as=old)
        values.append(value)
        self._current[id(tensor)] = (value.reference, len(values) - 1)
        return len(values) - 1


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
        for stack in (recorder.modules, recorder.sections, recorder.containers):
            del stack[depth + 1 :]

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()
