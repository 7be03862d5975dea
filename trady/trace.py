"""One forward pass on the meta device: which layers a model calls, with what shapes, in what order.

Nothing is computed and nothing is allocated: every tensor a call receives is replaced by one of the
same shape on the meta device. The model itself is only read.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from trady.calls.canonical import reworded, shown_parameter, transposed, transposes_weight
from trady.calls.decompositions import COMPOSITES, WITHOUT_MEMORY
from trady.calls.kinds import Call, NormCall, RecurrentCall
from trady.calls.questions import answer_about_device, is_metadata
from trady.calls.recognize import recognize
from trady.errors import ModelError
from trady.model.batch import (
    as_arguments,
    batch_size,
    describe,
    numbers_among,
    real_device,
    tensors_among,
    without_memory,
)
from trady.model.eager import COMPILED, compiler_is_loaded, uncompiled
from trady.model.mode import Section, current_section, kept_mode, tracing
from trady.quantized.linear import routed


@dataclass
class Value:
    """A tensor at one point of the trace; writing into it makes a new value.

    Attributes:
        producer: Index of the call that made it.
        readers: Calls that read its elements, in order.
        shape_readers: Calls that read its shape or kind.
        reference: The tensor, as long as somebody holds it.
        replaced: Whether a later call wrote into the same tensor.
        view: Whether it shares memory with another tensor.
        same_as: The value whose very tensor a call handed back, maybe with other content; ``None`` for a new one.
    """

    producer: int
    reference: weakref.ref[Tensor]
    shape: tuple[int, ...]
    readers: list[int] = field(default_factory=list)
    shape_readers: list[int] = field(default_factory=list)
    replaced: bool = False
    view: bool = False
    same_as: int | None = None

    @property
    def kept(self) -> bool:
        """Whether somebody still held the tensor, with this content, when the forward had ended."""
        return not self.replaced and self.reference() is not None


@dataclass
class TracedCall:
    """One call of a torch function.

    Attributes:
        function: The torch function.
        call: What it means, without its input tensor; ``None`` if it is not recognised.
        reads: Values whose elements it reads, in order of its arguments.
        makes: Values it returns.
        parameters: Parameters and buffers among its arguments.
        container: The innermost module with children that was running.
        module: The innermost module that was running.
        scope: The module whose call is computed anew as a whole if this call is: the model itself, or inside
            a checkpointed section the outermost module called there. ``None`` for calls that no module
            of ours surrounds when they are recomputed, or that run inside a custom autograd function or
            under ``torch.no_grad()``.
        numbers: Whole numbers among its arguments, in order: sizes, dimensions, indices.
        shapes: Shapes of the tensors among its arguments, in order.
        written: The values that it overwrites; ``None`` for a tensor that no call made (an input, a buffer).
        keywords: The whole numbers among each of its keyword arguments.
        aside: Whether it reads nothing but ids, masks and what is made of them, none of the model's own tensors.
    """

    function: Any
    call: Call | None
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    parameters: tuple[Tensor, ...]
    container: str
    module: str
    scope: str | None = ""
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    written: tuple[int | None, ...] = ()
    keywords: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aside: bool = False


@dataclass
class Trace:
    """A forward pass as a list of calls and the values between them.

    Attributes:
        calls: Calls that touch elements of tensors, in order.
        values: The tensors between them.
        spans: For every module call: module name, first call, one past the last call.
        batch: Samples in the example.
        element_bytes: Bytes of an element of the first layer's input.
    """

    calls: list[TracedCall] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    batch: int = 1


def trace_forward(model: nn.Module, example: Any, *, training: bool | None = None) -> Trace:
    """Run ``model`` on shapes alone.

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


def _trace(model: nn.Module, example: Any, training: bool | None) -> Trace:
    args, kwargs = as_arguments(example)
    recorder = _Recorder(model, real_device(model, example))
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        stack.enter_context(kept_mode(model, training))
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
                output = model(*tree_map(recorder.without_values, args), **tree_map(recorder.without_values, kwargs))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be traced on the example batch ({describe(example)}): "
                f"{type(error).__name__}: {error}. The example must be one batch as training will see it, and "
                "the forward pass must not branch on the values of tensors."
            ) from error
        finally:
            tracing.reset(token)
    if recorder.wrote_weights:  # RWKV rescales its own, and notes that it has: nothing has happened to them
        for module, before in attributes:
            vars(module).update(before)
    recorder.trace.batch = batch_size(example)
    outputs = list(tree_iter(output))
    recorder.trace.values = [_settle(value) for value in recorder.trace.values]
    del outputs
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


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, device: torch.device | None) -> None:
        super().__init__()
        self.trace = Trace()
        self.wrote_weights = False
        self._device = device
        self.containers: list[str] = [""]
        self.modules: list[str] = [""]
        self.sections: list[Section] = [current_section()]
        self._own: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self._counters = batch_counters(model)
        self._meta: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._current: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def to_meta(self, value: Any) -> Any:
        """Replace a tensor by one without memory or gradient; the same tensor always by the same one."""
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
        """Replace an input by one without memory; ids and masks stay: models look at their values."""
        keep = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        return value if keep else self.to_meta(value)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            torch.compiler.disable(_refuse_compiled)()
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if transposes_weight(func, args):
            return transposed(func, args, kwargs)
        func, args, kwargs = reworded(func, args, kwargs)
        tensors = list(tensors_among((*args, *kwargs.values())))
        index = len(self.trace.calls)
        if is_metadata(func):
            for value in map(self._value_of, tensors):
                if value is not None:
                    self.trace.values[value].shape_readers.append(index)
            answer = None if self._device is None else answer_about_device(func, self._device)
            return func(*args, **kwargs) if answer is None else answer
        if is_count(func, args, self._counters):
            return args[0]
        if not tensors:
            return func(*args, **kwargs)
        if func in READS_ONE and id(tensors[0]) in self._counters:
            return batches_counted(func, tensors[0])
        call = recognize(func, args, kwargs)
        shown = [shown_parameter(t) for t in tensors]
        reads = tuple(v for v in map(self._value_of, tensors) if v is not None)
        for value in reads:
            self.trace.values[value].readers.append(index)
        entry = TracedCall(
            function=func,
            call=None if call is None else _without_input(call),
            reads=reads,
            makes=(),
            parameters=tuple(t for t in shown if id(t) in self._own),
            container=self.containers[-1],
            module=self.modules[-1],
            scope=self._scope(),
            input_shape=() if call is None else tuple(call.x.shape),
            numbers=tuple(numbers_among((*args, *kwargs.values()))),
            shapes=tuple(tuple(t.shape) for t in tensors),
            keywords={name: tuple(numbers_among((value,))) for name, value in kwargs.items()},
            aside=not any(t.is_meta or id(t) in self._own for t in shown),
        )
        self.trace.calls.append(entry)
        places = [self._value_of(t) for t in tensors]
        touched = tensors if entry.aside else [self.to_meta(t) for t in tensors]
        versions = [_version(t) for t in touched]
        out = func(*args, **kwargs) if entry.aside else self._run_on_meta(func, call, args, kwargs)
        changed = [_version(tensor) != version for tensor, version in zip(touched, versions, strict=True)]
        entry.written = tuple(place for place, new in zip(places, changed, strict=True) if new)
        self.wrote_weights |= any(new and isinstance(t, nn.Parameter) for t, new in zip(tensors, changed, strict=True))
        made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        entry.makes = tuple(self._register(t, index, tensors) for t in made)
        entry.output_shape = tuple(made[0].shape) if made else ()
        if isinstance(call, RecurrentCall):
            entry.input_shape, entry.output_shape = call.product_shapes
        return out

    def _run_on_meta(self, func: Any, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(call, NormCall):
            x = self.to_meta(call.x)
            return torch.empty_like(x)
        return WITHOUT_MEMORY.get(func, func)(*tree_map(self.to_meta, args), **tree_map(self.to_meta, kwargs))

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


def _without_input(call: Call) -> Call:
    """Drop the activations: the trace must not keep alive what the model lets go."""
    assert is_dataclass(call)
    return replace(call, **{f.name: None for f in fields(call) if f.name in ("x", "target", "states")})  # type: ignore[arg-type]


def batch_counters(model: nn.Module) -> dict[int, Tensor]:
    """Find the buffers in which batch normalisations count batches; trady's norms are frozen and do not count."""
    counters = [m._buffers.get("num_batches_tracked") for m in model.modules()]
    return {id(t): t for t in counters if t is not None}


def is_count(function: Any, args: tuple[Any, ...], counters: Mapping[int, Tensor]) -> bool:
    """Whether a call is a batch normalisation counting a batch."""
    return function is torch.Tensor.add_ and bool(args) and id(args[0]) in counters


_META = torch.device("meta")

#: How a batch normalisation reads its counter: ``momentum=None`` divides by it.
READS_ONE = {torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.item}


def batches_counted(function: Any, counter: Tensor) -> float | int:
    """The number of batches, at least 1: what it weighs does not matter where statistics are fixed."""
    count = 1 if counter.is_meta else max(1, int(counter))
    return float(count) if function is torch.Tensor.__float__ else count


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
