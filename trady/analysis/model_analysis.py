"""All that is known of a model before it is armed: table, head, and how its calls will be computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trady.analysis.fusion import FusionPlan, Step, plan_fusion
from trady.analysis.head import find_head, head_parameters
from trady.analysis.layers import build_table
from trady.analysis.sample_axes import CallSamples, carried_over, samples_of
from trady.analysis.segments import Segments, find_segments, total_work
from trady.calls.actions import WithLayer
from trady.channels.table import ChannelTable
from trady.errors import ModelError
from trady.model.batch import Batch
from trady.model.mode import ByMode
from trady.ops.frozen_norm import FrozenNorm
from trady.quantized.formats import keep_unpacked
from trady.trace.forward import trace_forward
from trady.trace.trace import Trace

#: Traces of one batch.
Traces = ByMode[Trace]


@dataclass(frozen=True)
class ModelAnalysis:
    """A model as one example batch shows it.

    Attributes:
        table: Its layers and their costs.
        head: Modules that are always trained.
        head_parameters: Their parameters, under full names.
        plans: The expected calls in training and in evaluation mode.
        held: Names of the layers that a person, or a limit of time, keeps from training; they are in the table, and
            never drawn.
    """

    table: ChannelTable
    head: tuple[str, ...]
    head_parameters: dict[str, nn.Parameter]
    plans: ByMode[FusionPlan]
    held: frozenset[str] = frozenset()

    @property
    def drawable(self) -> tuple[str, ...]:
        """Names of the layers that channels may be drawn from."""
        return tuple(name for name in self.table.names if name not in self.held)

    def of_copy(self, model: nn.Module, copy: nn.Module) -> ModelAnalysis:
        """Return the same analysis of a copy of the model, in terms of the copy's own tensors.

        Args:
            model: The analysed model.
            copy: A copy whose modules, parameters and buffers have the same names.

        """
        there = _tensors_by_name(copy)
        tensors = {id(tensor): there[name] for name, tensor in _tensors_by_name(model).items()}

        def plan_of_copy(plan: FusionPlan) -> FusionPlan:
            return replace(
                plan,
                steps=tuple(_step_of_copy(step, tensors) for step in plan.steps),
                norms=tuple(_norm_of_copy(norm, tensors) for norm in plan.norms if id(norm.mean) in tensors),
            )

        return replace(self, head_parameters=head_parameters(copy, self.head), plans=self.plans.map(plan_of_copy))


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _step_of_copy(step: Step, tensors: Mapping[int, Tensor]) -> Step:
    action = step.action
    if isinstance(action, WithLayer) and action.norm is not None:
        action = replace(action, norm=_norm_of_copy(action.norm, tensors))
    parameters = tuple(id(tensors[p]) if p in tensors else p for p in step.parameters)
    return replace(step, parameters=parameters, action=action)


def _norm_of_copy(norm: FrozenNorm, tensors: Mapping[int, Tensor]) -> FrozenNorm:
    owned = {name: getattr(norm, name) for name in ("mean", "variance", "weight", "bias")}
    return replace(norm, **{name: tensors.get(id(tensor), tensor) for name, tensor in owned.items()})


def trace_modes(model: nn.Module, example: Batch | Any, *, evaluation: bool = True) -> Traces:
    """Trace a model in training mode and, if it is to run in that too, in evaluation mode."""
    keep_unpacked(model)
    batch = Batch.of(example, model)
    training = trace_forward(model, batch, training=True)
    return ByMode(training, trace_forward(model, batch, training=False) if evaluation else None)


def analyse_model(
    model: nn.Module,
    example: Batch | Any,
    *,
    head: str | Sequence[str] | None = "auto",
    fuse: bool = True,
    traces: Traces | None = None,
    frozen: Collection[int] = (),
) -> ModelAnalysis:
    """List what can be updated in a model, and how its calls are computed.

    Args:
        model: The model, on any device.
        example: One batch as training will see it.
        head: See :func:`trady.analysis.head.find_head`.
        fuse: Whether calls may be computed together and overwrite their inputs.
        traces: Traces of this batch; without them, the model is traced in both modes.
        frozen: Identities of the parameters that are frozen by hand.

    Raises:
        ModelError: The model cannot be traced, or has nothing to update.

    """
    batch = Batch.of(example, model)
    traces = traces or trace_modes(model, batch)
    names = find_head(model, traces.training, head, frozen)
    plain = head_parameters(model, names)
    identities = {id(p) for p in plain.values()}
    plans = traces.map(lambda trace: plan_fusion(trace, identities, fuse=fuse))
    table = build_table(model, traces.training, plans.training, names, batch.dtype_in(model))
    held = frozenset(layer.name for layer in table if id(model.get_parameter(layer.parameter)) in frozen)
    if table.layers and len(held) == len(table) and not plain:
        raise ModelError(
            f"every layer of this {type(model).__name__} is frozen by hand: set requires_grad_(True) where it may "
            "train, or name layers as train=..."
        )
    return ModelAnalysis(table, names, plain, plans, held)


def find_recomputable(
    model: nn.Module, example: Batch | Any, analysis: ModelAnalysis, traces: Traces | None = None
) -> tuple[Segments, int]:
    """Find what can be recomputed in the backward pass.

    Args:
        model: The model.
        example: One batch as training will see it.
        analysis: What is known of the model.
        traces: Traces of this batch; without them, the model is traced again.

    Returns:
        The segments, and the multiply-adds of a full forward pass.

    """
    batch = Batch.of(example, model)
    traces = traces or trace_modes(model, batch, evaluation=analysis.plans.evaluation is not None)
    element_bytes = batch.dtype_in(model).itemsize
    samples = _samples(model, batch, traces.training, training=True)
    found = find_segments(traces.training, analysis.plans.training, samples, element_bytes)
    work = total_work(traces.training)
    trace, plan = traces.evaluation, analysis.plans.evaluation
    if trace is None or plan is None:
        return ByMode(found), work
    known = carried_over(traces.training, samples, trace)
    samples = _samples(model, batch, trace, training=False) if known is None else known
    return ByMode(found, find_segments(trace, plan, samples, element_bytes)), max(work, total_work(trace))


def _samples(model: nn.Module, batch: Batch, trace: Trace, *, training: bool) -> list[CallSamples | None]:
    try:
        return samples_of(trace, trace_forward(model, batch.doubled, training=training, like=trace))
    except ModelError:  # it takes batches of one size only
        return [None] * len(trace.calls)
