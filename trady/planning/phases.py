"""What the phases of a training take at their peak, besides its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trady.channels.selection import Selection
from trady.planning.spending import COUNTER_BYTES, Moment
from trady.simulation.timeline import compact_forms

if TYPE_CHECKING:
    from trady.planning.decision import Decision

#: The number of a channel; those of a weight that is being saved are cut into group and place as well.
_NUMBER_BYTES = 8


def predicted_phases(decision: Decision, moment: Moment, selection: Selection, step_bytes: int) -> dict[str, int]:
    """Predict the peak of each phase in bytes of tensors, weights and a batch included.

    Args:
        decision: What was decided.
        moment: With what the optimizer takes.
        selection: Channels that train.
        step_bytes: The peak of a step.

    Returns:
        ``step``; ``evaluation`` of a batch like the one that is trained on; ``saving`` of a checkpoint or the weights,
        tensor by tensor; ``finishing``, which gives the plain model back. All with one label for each sample.
    """
    spending, table = decision.spending(moment), decision.table
    resident, working = decision.peaks.inference_bytes
    forms = compact_forms(table, selection)
    norms = decision.analysis.plans.training.norms
    kept = sum(2 * norm.mean.nbytes for norm in norms) + sum(form.whole for form in forms)
    kept += spending.kept_bytes(selection, with_head=True)
    kept += sum(_numbers(decision, selection, name) for name, _ in selection.items())
    if moment.optimizer.copies > 1:  # Adam counts the steps of every tensor
        kept += COUNTER_BYTES * (len(forms) + len(decision.analysis.head_parameters))
    base = resident + decision.loop.waiting_bytes + kept + _NUMBER_BYTES * table.batch
    element = table.weight_element_bytes
    pool = [table[name] for name in spending.layers]
    named = sum(_NUMBER_BYTES * (layer.channels + 1) for layer in pool)  # channels and groups of every layer
    weights = [layer.channels * (layer.weight_elements * element + 2 * _NUMBER_BYTES) for layer in pool]
    heads = [parameter.nbytes for parameter in decision.analysis.head_parameters.values()]
    return {
        "step": step_bytes,
        "evaluation": base + working,
        "saving": base + named + max((*weights, *heads), default=0),
        "finishing": base,
    }


def _numbers(decision: Decision, selection: Selection, name: str) -> int:
    """Bytes of the indices of a layer's channels."""
    kinds = 1 if decision.table[name].groups == 1 else 5
    return _NUMBER_BYTES * (1 + kinds * len(selection.channels[name]) + (selection.output_count(name) or 0))
