"""The head: modules that always train, outside the budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from trady.calls.kinds import RecurrentCall, WeightCall
from trady.calls.names import name_of
from trady.errors import ModelError
from trady.model.parameters import own_parameters
from trady.ops.quantized import is_quantized
from trady.trace.trace import Trace, TracedCall


def find_head(
    model: nn.Module, trace: Trace, head: str | Sequence[str] | None, frozen: Collection[int] = ()
) -> tuple[str, ...]:
    """Name the modules of the classifier, which always trains and stands outside the budget.

    Args:
        model: The model.
        trace: Its forward pass.
        head: ``"auto"`` is each weight layer that an output is made by and no other weight reads from, unless it is
            used elsewhere too, frozen by hand, or a language model's: one that scores every token read against a
            vocabulary is trained before, like the layers below it. Else one or several names of modules or
            parameters; ``None`` or an empty sequence is no head.
        frozen: Identities of the parameters that are frozen by hand.

    Raises:
        ModelError: A name that is no module with parameters.

    """
    if head is None:
        return ()
    if head != "auto":
        names = (head,) if isinstance(head, str) else tuple(head)
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for name in names:
            if name not in parameters and (name not in modules or next(own_parameters(modules[name]), None) is None):
                possible = [n for n, m in modules.items() if n and next(m.parameters(False), None) is not None]
                raise ModelError(f"head {name!r} is no module with parameters; the last ones are {possible[-5:]}")
        for name, parameter in head_parameters(model, names).items():
            if is_quantized(parameter):
                raise ModelError(f"head {name!r} cannot train: it is {stored_as(parameter)}")
        return names
    found: list[str] = []
    for weight, uses in _last_layers(trace):
        if id(weight) in frozen or is_quantized(weight) or any(isinstance(use.call, RecurrentCall) for use in uses):
            continue
        if any(_scores_tokens(use, weight, trace) for use in uses):
            continue
        owners = [name for name, module in model.named_modules() if any(p is weight for p in module.parameters(False))]
        if len(owners) != 1:
            continue
        own = {id(p) for use in uses for p in use.parameters}
        if all(id(p) in own for p in own_parameters(model.get_submodule(owners[0]))):
            found.append(owners[0])
        else:  # the module has other weights too: the head is what these calls read
            found += [name for name, parameter in model.named_parameters() if id(parameter) in own]
    return tuple(dict.fromkeys(found))


def _last_layers(trace: Trace) -> list[tuple[nn.Parameter, list[TracedCall]]]:
    """The weights that an output of the model is made by, and no other weight reads from; with the calls of each.

    An output that several weights have gone into since (the sum at the end of a residual network, a fused loss of many
    parts) has no last layer. What nobody reads and nobody gets (a pooler beside the output that is used) is none.
    """
    bits: dict[int, int] = {}
    weights: list[tuple[nn.Parameter, list[TracedCall]]] = []
    made_by, read_on = [0] * len(trace.values), 0
    for entry in trace.calls:
        mask = 0
        for value in entry.reads:
            mask |= made_by[value]
        matrices = [p for p in entry.parameters if isinstance(p, nn.Parameter) and p.dim() > 1]
        if matrices:
            read_on |= mask
            mask = 0
        for weight in matrices:
            if id(weight) not in bits:
                bits[id(weight)] = 1 << len(weights)
                weights.append((weight, []))
            mask |= bits[id(weight)]
            weights[bits[id(weight)].bit_length() - 1][1].append(entry)
        for value in entry.makes:
            made_by[value] = 0 if entry.without_gradient else mask
    outputs = {made_by[index] for index, value in enumerate(trace.values) if value.kept}
    return [found for found in weights if bits[id(found[0])] in outputs and not bits[id(found[0])] & read_on]


def _scores_tokens(call: TracedCall, weight: nn.Parameter, trace: Trace) -> bool:
    """Whether a weight layer turns each token that the model read into scores for all of its vocabulary.

    The vocabulary is the largest table that is read; that of positions or token types may be as large as a
    classifier's weight.
    """
    looked_up = [entry for entry in trace.calls if name_of(entry.function) == "embedding" and entry.parameters]
    largest = max(looked_up, key=lambda entry: entry.parameters[0].numel(), default=None)
    if largest is None or largest.parameters[0].shape != weight.shape:
        return False
    # In a loss of a custom function it may score some of the tokens, in parts.
    return call.in_function or largest.output_shape[:-1] == call.output_shape[:-1]


def head_parameters(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Parameter]:
    """Collect the parameters of the head modules under their full names."""
    found: dict[str, nn.Parameter] = {}
    parameters = dict(model.named_parameters())
    for name in head:
        if name in parameters:
            found[name] = parameters[name]
            continue
        for inner, parameter in model.get_submodule(name).named_parameters():
            found[f"{name}.{inner}" if name else inner] = parameter
    return found


def weight_parameter(entry: TracedCall) -> nn.Parameter | None:
    """Return the weight that a call applies and that can be intercepted there; ``None`` for other calls."""
    call = entry.call
    if entry.scope is None:
        return None
    return call.weight if isinstance(call, WeightCall) and isinstance(call.weight, nn.Parameter) else None


def stored_as(parameter: nn.Parameter) -> str:
    """Say how a quantised weight is stored, for messages."""
    numbers = str(parameter.dtype).removeprefix("torch.")
    return f"stored quantised, as {type(parameter).__name__} of {numbers}"
