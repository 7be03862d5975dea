"""From a trace to the channel table: which weights can be updated by input channel, and at what cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from trady.analysis.fusion import FusionPlan
from trady.analysis.gradient_flow import reached_by_gradients
from trady.analysis.head import head_parameters, stored_as, weight_parameter
from trady.calls.kinds import WeightCall
from trady.channels.table import ChannelTable, FrozenLayer, Layer
from trady.errors import ModelError
from trady.model.parameters import own_parameters
from trady.ops.quantized import is_quantized
from trady.quantized.linear import QuantizedLinear
from trady.trace.trace import Trace, TracedCall


def build_table(
    model: nn.Module, trace: Trace, plan: FusionPlan, head: Sequence[str], example_dtype: torch.dtype
) -> ChannelTable:
    """List every layer that can be updated by input channel, in order of execution.

    Args:
        model: The model.
        trace: Its forward pass in training mode.
        plan: How its calls are computed (for the shape of what is saved).
        head: Modules that always train.
        example_dtype: Type of the activations.

    Raises:
        ModelError: There is nothing to update.

    """
    plain = {id(p) for p in head_parameters(model, head).values()}
    names = _parameter_names(model)
    calls: dict[int, list[tuple[int, TracedCall]]] = {}
    others: dict[int, set[str]] = {}
    reached, aside, trained = reached_by_gradients(trace), set[int](), set[int]()
    for index, entry in enumerate(trace.calls):
        weight = weight_parameter(entry)
        if weight is not None and id(weight) not in names and weight.requires_grad and not entry.without_gradient:
            raise ModelError(
                f"the forward pass of {type(model).__name__} trains a weight that is no part of it, of shape "
                f"{tuple(weight.shape)}: make its module a part of the model (self.name = module), freeze it "
                "(requires_grad_(False)), or call it behind the model, in the loss"
            )
        if not reached[index]:
            aside.update(map(id, entry.parameters))
            if weight is None or entry.without_gradient:
                continue  # what is detached keeps as much for a while as what is not
        elif weight is not None:
            trained.add(id(weight))
        if weight is not None:
            calls.setdefault(id(weight), []).append((index, entry))
        for parameter in entry.parameters if reached[index] else ():
            if parameter is not weight:
                others.setdefault(id(parameter), set()).add(_use(entry))
    calls = {identity: entries for identity, entries in calls.items() if identity in trained}
    frozen = []
    reasons = {id(p): _reason(p, calls, others, plain, aside) for p in own_parameters(model) if p.dim() > 1}
    trains = [identity for identity in calls if identity in reasons and reasons[identity] is None]
    layers = [_layer(calls[identity], plan, names[identity], trace.batch) for identity in trains]
    owners = Counter(layer.name for layer in layers)
    layers = [replace(layer, name=layer.parameter) if owners[layer.name] > 1 else layer for layer in layers]
    for parameter in own_parameters(model):
        reason = reasons.get(id(parameter))
        if reason is not None:
            name = names[id(parameter)]
            frozen.append(FrozenLayer(name.rpartition(".")[0], name, reason))
    if not layers and not plain:
        listed = "; ".join(f"{f.parameter}: {f.reason}" for f in frozen[:5]) or "it has no weights"
        raise ModelError(
            f"{type(model).__name__} has no layer that can be updated by input channel ({listed}). "
            "trady updates linear layers and convolutions; name other modules to train as head=..."
        )
    return ChannelTable(
        layers=tuple(layers),
        frozen=tuple(frozen),
        batch=trace.batch,
        element_bytes=example_dtype.itemsize,
        weight_element_bytes=max(
            (_element_bytes(calls[id(model.get_parameter(v.parameter))]) for v in layers), default=4
        ),
        parameters=sum(_elements(parameter, calls) for parameter in own_parameters(model)),
    )


_UNSEEN = " in a custom function, or in a checkpointed one outside of any module"


def _use(entry: TracedCall) -> str:
    name = str(getattr(entry.function, "__name__", entry.function))
    return name + _UNSEEN if entry.scope is None else name


def _quantized(entries: Sequence[tuple[int, TracedCall]]) -> QuantizedLinear | None:
    """The quantised layer that makes these calls of a weight; ``None`` if the weight is a plain one."""
    found = (entry.call.layer for _, entry in entries if isinstance(entry.call, WeightCall))
    return next((layer for layer in found if layer is not None), None)


def _element_bytes(entries: Sequence[tuple[int, TracedCall]]) -> int:
    """Bytes of one element of a channel that trains."""
    layer, call = _quantized(entries), entries[0][1].call
    assert isinstance(call, WeightCall)
    return call.weight.element_size() if layer is None else layer.dtype.itemsize


def _elements(parameter: nn.Parameter, calls: Mapping[int, Sequence[tuple[int, TracedCall]]]) -> int:
    layer = _quantized(calls.get(id(parameter), ()))
    return parameter.numel() if layer is None else math.prod(layer.shape)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _reason(
    parameter: nn.Parameter,
    calls: dict[int, list[tuple[int, TracedCall]]],
    others: dict[int, set[str]],
    plain: set[int],
    aside: set[int],
) -> str | None:
    """Why a weight cannot be updated by input channel; ``None`` when it can."""
    if id(parameter) in plain:
        return "head: always trained, outside the budget"
    if is_quantized(parameter) and _quantized(calls.get(id(parameter), ())) is None:
        return f"{stored_as(parameter)}, outside of a linear layer that can be read: gradients pass through it"
    used = ", ".join(sorted(others.get(id(parameter), ())))
    if id(parameter) not in calls and _UNSEEN in used:
        return f"used by {used}, where it cannot be intercepted"
    if id(parameter) not in calls and not used and id(parameter) in aside:
        return "no gradient reaches it: it runs under no_grad, or what it makes is detached"
    if id(parameter) not in calls:
        return f"used by {used}, which has no input channels to choose from" if used else "not used in the forward pass"
    if used:
        return f"also used by {used}: its input channels alone would give half a gradient"
    maps = {
        (entry.call.operator.kind, entry.call.operator.groups)
        for _, entry in calls[id(parameter)]
        if isinstance(entry.call, WeightCall)
    }
    if len(maps) > 1:
        return f"used as {' and '.join(sorted(kind for kind, _ in maps))} with different groups"
    return None


def _layer(entries: list[tuple[int, TracedCall]], plan: FusionPlan, parameter: str, batch: int) -> Layer:
    first = entries[0][1].call
    assert isinstance(first, WeightCall)
    shape, operator = first.weight_shape, first.operator
    groups = operator.groups
    if operator.kind == "addmm":
        channels, weight_elements = shape[0], shape[1]
    else:
        channels = shape[1] * groups
        weight_elements = math.prod(shape) // channels
    inputs = tuple(plan.saved_shapes.get(index, entry.input_shape) for index, entry in entries)
    outputs = tuple(entry.output_shape for _, entry in entries)
    # Output positions of one sample: everything but batch and output channels.
    positions = [math.prod(made) // (batch * first.output_channels) for made in outputs]
    return Layer(
        name=parameter.rpartition(".")[0],
        parameter=parameter,
        kind=operator.kind,
        channels=channels,
        weight_elements=weight_elements,
        activation_elements=sum(-(-math.prod(given) // (batch * channels)) for given in inputs),
        flops=sum(weight_elements * p for p in positions),
        weight_shape=tuple(shape),
        input_shapes=inputs,
        output_shapes=outputs,
        groups=groups,
        quantized=_quantized(entries) is not None,
        standardised=first.eps is not None,
    )
