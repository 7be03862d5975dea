"""All that is known of a model before it is armed: table, head, and how its calls will be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trady.analysis.fusion import FusionPlan, Step, plan_fusion
from trady.analysis.head import find_head, head_parameters
from trady.analysis.layers import build_table
from trady.analysis.sample_axes import CallSamples, carried_over, samples_of
from trady.analysis.segments import Segment, find_segments, work_of
from trady.calls.actions import WithLayer
from trady.channels.table import ChannelTable
from trady.errors import ModelError
from trady.model.batch import Batch
from trady.quantized.formats import keep_unpacked
from trady.trace.recorder import trace_forward
from trady.trace.trace import Trace

#: Traces of one batch in training (True) and in evaluation mode (False).
Traces = Mapping[bool, Trace]


@dataclass(frozen=True)
class ModelAnalysis:
    """A model as one example batch shows it.

    Attributes:
        table: Its layers and their costs.
        head: Modules that are always trained.
        head_parameters: Their parameters, under full names.
        plans: The expected calls in training (True) and evaluation mode (False).
    """

    table: ChannelTable
    head: tuple[str, ...]
    head_parameters: dict[str, nn.Parameter]
    plans: dict[bool, FusionPlan]

    def of_copy(self, model: nn.Module, copy: nn.Module) -> ModelAnalysis:
        """Return the same analysis of a copy of the model, in terms of the copy's own tensors.

        Args:
            model: The analysed model.
            copy: A copy whose modules, parameters and buffers have the same names.

        """
        there = _tensors_by_name(copy)
        tensors = {id(tensor): there[name] for name, tensor in _tensors_by_name(model).items()}
        plans = {
            mode: replace(plan, steps=tuple(_step_of_copy(step, tensors) for step in plan.steps))
            for mode, plan in self.plans.items()
        }
        return replace(self, head_parameters=head_parameters(copy, self.head), plans=plans)


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _step_of_copy(step: Step, tensors: Mapping[int, Tensor]) -> Step:
    action = step.action
    if isinstance(action, WithLayer) and action.norm is not None:
        norm = action.norm
        owned = {name: getattr(norm, name) for name in ("mean", "variance", "weight", "bias")}
        there = {name: tensors.get(id(tensor), tensor) for name, tensor in owned.items()}
        action = replace(action, norm=replace(norm, **there))
    parameters = tuple(id(tensors[p]) if p in tensors else p for p in step.parameters)
    return replace(step, parameters=parameters, action=action)


def trace_modes(model: nn.Module, example: Batch | Any, modes: Sequence[bool] = (True, False)) -> Traces:
    """Trace a model in training (True) and evaluation mode (False)."""
    keep_unpacked(model)
    batch = Batch.of(example)
    return {mode: trace_forward(model, batch, training=mode) for mode in modes}


def analyse_model(
    model: nn.Module,
    example: Batch | Any,
    *,
    head: str | Sequence[str] | None = "auto",
    fuse: bool = True,
    traces: Traces | None = None,
) -> ModelAnalysis:
    """List what can be updated in a model, and how its calls are computed.

    Args:
        model: The model, on any device.
        example: One batch as training will see it.
        head: See :func:`trady.analysis.head.find_head`.
        fuse: Whether calls may be computed together and overwrite their inputs.
        traces: Traces of this batch; without them, the model is traced in both modes.

    Raises:
        ModelError: The model cannot be traced, or has nothing to update.

    """
    batch = Batch.of(example)
    traces = traces or trace_modes(model, batch)
    names = find_head(model, traces[True], head)
    plain = head_parameters(model, names)
    identities = {id(p) for p in plain.values()}
    plans = {mode: plan_fusion(trace, identities, fuse=fuse) for mode, trace in traces.items()}
    table = build_table(model, traces[True], plans[True], names, batch.dtype_in(model))
    return ModelAnalysis(table, names, plain, plans)


def find_recomputable(
    model: nn.Module, example: Batch | Any, analysis: ModelAnalysis, traces: Traces | None = None
) -> tuple[dict[bool, tuple[Segment, ...]], int]:
    """Find what can be recomputed in the backward pass.

    Args:
        model: The model.
        example: One batch as training will see it.
        analysis: What is known of the model.
        traces: Traces of this batch; without them, the model is traced again.

    Returns:
        The segments in training (True) and in evaluation mode (False), and the multiply-adds of a whole
        forward pass.

    """
    batch = Batch.of(example)
    traces = traces or trace_modes(model, batch, tuple(analysis.plans))
    samples: dict[bool, list[CallSamples | None]] = {}
    for mode, trace in traces.items():
        known = carried_over(traces[True], samples[True], trace) if samples else None
        samples[mode] = _samples(model, batch, trace, mode) if known is None else known
    element_bytes = batch.dtype_in(model).itemsize
    found = {
        mode: find_segments(trace, analysis.plans[mode], samples[mode], element_bytes) for mode, trace in traces.items()
    }
    return found, max(sum(work_of(trace, entry) for entry in trace.calls) for trace in traces.values())


def _samples(model: nn.Module, batch: Batch, trace: Trace, training: bool) -> list[CallSamples | None]:
    try:
        return samples_of(trace, trace_forward(model, batch.doubled, training=training))
    except ModelError:  # it takes batches of one size only
        return [None] * len(trace.calls)
