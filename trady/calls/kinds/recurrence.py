"""The steps of recurrent layers: a weight that is applied to the hidden state in front of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from trady.calls.actions import InPlace
from trady.calls.handling import Handling, constant, labelled, refuse_trained
from trady.calls.kind import CallKind, Keeps
from trady.calls.kinds.weight import WeightCall
from trady.calls.sample_rules import SampledCall
from trady.ops.operators import Linear
from trady.ops.recurrent.recurrence import RecurrentOptions, recurrence, recurrent
from trady.ops.recurrent.steps import Steps
from trady.ops.sample_axis import SampleAxis


@dataclass(frozen=True)
class RecurrentCall(WeightCall):
    """The steps of a recurrent layer: ``weight`` is applied to the hidden state in front of each of them.

    ``x`` are the gates, with the products of the inputs in them; see :func:`trady.ops.recurrent.recurrence.recurrence`.
    """

    states: Sequence[Tensor] = ()
    projection: Tensor | None = None
    steps: Steps = field(default_factory=lambda: Steps(""))

    @property
    def product_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what the weight is applied to, and of what comes of it, all steps together."""
        shape = tuple(self.x.shape)
        return (*shape[:-1], self.weight.shape[1]), shape


def _read(
    gates: Tensor,
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None,
    steps: Steps,
) -> RecurrentCall:
    return RecurrentCall(gates, weight, bias, Linear(), states=states, projection=projection, steps=steps)


def _by_sample(sampled: SampledCall) -> bool:
    """Sequences one by one: packed ones are mixed, and steps depend on each other."""
    call = sampled.call
    assert isinstance(call, RecurrentCall)
    gates, *others = sampled.input_axes
    ends = sampled.output_axes[1:]
    states, weights = others[: len(ends)], others[len(ends) :]
    if gates is None or call.steps.sizes or any(weights):
        return False
    of_batch = SampleAxis(1 if call.steps.time == 0 else 0, gates.per_sample)
    of_state = SampleAxis(0, gates.per_sample)
    return gates == sampled.output_axes[0] == of_batch and all(state == of_state for state in (*states, *ends))


def _compute(call: RecurrentCall, handling: Handling) -> tuple[Tensor, ...] | None:
    if not isinstance(call.weight, nn.Parameter) or handling.in_head(call.weight):
        return None
    own = handling.layer_of(call.weight)
    refuse_trained(None if own else call.weight, call.bias, call.projection)
    selected, leaf = (None, None) if own is None else (own.selected, own.leaf)
    overwrite = isinstance(handling.action, InPlace) and handling.action.overwrite
    options = RecurrentOptions(call.steps, selected, overwrite)
    with labelled(call.steps.cell):
        out = recurrent(call.x, call.states, leaf, options, constant(call.weight), call.bias, call.projection)
    if own is not None:
        handling.ran(own, out[0])
    return out


RECURRENCE = CallKind(
    RecurrentCall,
    readers={recurrence: _read},
    keeps=lambda call: Keeps.BOTH,
    handler=_compute,
    samples=_by_sample,
    activations=("x", "states"),
)
