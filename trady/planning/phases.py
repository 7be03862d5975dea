"""What the phases of a training take at their peak, besides its steps."""

from __future__ import annotations

from trady.analysis.model_analysis import ModelAnalysis
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.planning.spending import COUNTER_BYTES, Spending
from trady.simulation.timeline import compact_forms

#: The number of a channel; those of a weight that is being saved are cut into group and place as well.
_NUMBER_BYTES = 8


def predicted_phases(
    spending: Spending, analysis: ModelAnalysis, waiting_bytes: int, selection: Selection, step_bytes: int
) -> dict[str, int]:
    """Predict the peak of each phase in bytes of tensors, weights and a batch included.

    Args:
        spending: What selections take now.
        analysis: What is known of the model.
        waiting_bytes: Bytes of a larger batch, and of batches read ahead, that wait while the model works.
        selection: Channels that train.
        step_bytes: The peak of a step.

    Returns:
        ``step``; ``evaluation`` of a batch like the one that is trained on; ``saving`` of a checkpoint or the weights,
        tensor by tensor; ``finishing``, which gives the plain model back. All with one label for each sample.
    """
    table = spending.table
    resident, working = spending.peaks.inference_bytes
    forms = compact_forms(table, selection)
    norms = analysis.plans.training.norms
    kept = sum(2 * norm.mean.nbytes for norm in norms) + sum(form.whole for form in forms)
    kept += spending.kept_bytes(selection, with_head=True)
    kept += sum(_numbers(table, selection, name) for name, _ in selection.items())
    if spending.moment.optimizer.copies > 1:  # Adam counts the steps of every tensor
        kept += COUNTER_BYTES * (len(forms) + len(analysis.head_parameters))
    base = resident + waiting_bytes + kept + _NUMBER_BYTES * table.batch
    element = table.weight_element_bytes
    pool = [table[name] for name in spending.layers]
    named = sum(_NUMBER_BYTES * (layer.channels + 1) for layer in pool)  # channels and groups of every layer
    weights = [layer.channels * (layer.weight_elements * element + 2 * _NUMBER_BYTES) for layer in pool]
    heads = [parameter.nbytes for parameter in analysis.head_parameters.values()]
    return {
        "step": step_bytes,
        "evaluation": base + working,
        "saving": base + named + max((*weights, *heads), default=0),
        "finishing": base,
    }


def _numbers(table: ChannelTable, selection: Selection, name: str) -> int:
    """Bytes of the indices of a layer's channels."""
    kinds = 1 if table[name].groups == 1 else 5
    return _NUMBER_BYTES * (1 + kinds * len(selection.channels[name]) + (selection.output_count(name) or 0))
