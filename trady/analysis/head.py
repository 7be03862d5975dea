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
        head: ``"auto"`` is the last weight layer that is called, unless its weight is used elsewhere
            too or it is a language model's: one that scores every token read against a vocabulary is trained
            before, like the layers below it, or it is frozen by hand. Else one or several names of modules or
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
    weights = [entry for entry in trace.calls if weight_parameter(entry) is not None]
    if not weights:
        return ()
    last = weight_parameter(weights[-1])
    if last is None or id(last) in frozen or is_quantized(last) or isinstance(weights[-1].call, RecurrentCall):
        return ()
    if _scores_tokens(weights[-1], last, trace):
        return ()
    users = [entry for entry in trace.calls if any(p is last for p in entry.parameters)]
    owners = [name for name, module in model.named_modules() if any(p is last for p in module.parameters(False))]
    if len(users) != 1 or len(owners) != 1:
        return ()
    own = {id(p) for p in users[0].parameters}
    if all(id(p) in own for p in own_parameters(model.get_submodule(owners[0]))):
        return (owners[0],)
    # The module has other weights too: the head is what the last call reads.
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in own)


def _scores_tokens(call: TracedCall, weight: nn.Parameter, trace: Trace) -> bool:
    """Whether a weight layer turns each token that the model read into scores for all of its vocabulary.

    The vocabulary is the largest table that is read; that of positions or token types may be as large as a
    classifier's weight.
    """
    looked_up = [entry for entry in trace.calls if name_of(entry.function) == "embedding" and entry.parameters]
    largest = max(looked_up, key=lambda entry: entry.parameters[0].numel(), default=None)
    return (
        largest is not None
        and largest.parameters[0].shape == weight.shape
        and largest.output_shape[:-1] == call.output_shape[:-1]
    )


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
