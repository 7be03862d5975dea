"""All that is known of a model before it is armed: table, head, and how its calls will be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trady.analysis.fusion import FusionPlan, plan_fusion
from trady.analysis.head import find_head, head_parameters
from trady.analysis.layers import build_table
from trady.analysis.sample_axes import samples_of
from trady.analysis.segments import Segment, find_segments, work_of
from trady.channels.table import ChannelTable
from trady.errors import ModelError
from trady.model.batch import activation_dtype, twice
from trady.quantized.formats import keep_unpacked
from trady.trace.recorder import trace_forward


@dataclass(frozen=True)
class ModelAnalysis:
    """A model as one example batch shows it.

    Attributes:
        table: Its layers and their costs.
        head: Modules that always train.
        head_parameters: Their parameters, under full names.
        plans: The expected calls in training (True) and evaluation mode (False).
    """

    table: ChannelTable
    head: tuple[str, ...]
    head_parameters: dict[str, nn.Parameter]
    plans: dict[bool, FusionPlan]


def analyse_model(
    model: nn.Module,
    example: Any,
    *,
    head: str | Sequence[str] | None = "auto",
    fuse: bool = True,
    modes: Sequence[bool] = (True, False),
) -> ModelAnalysis:
    """Trace a model in both modes and list what can be updated.

    Args:
        model: The model, on any device.
        example: One batch as training will see it.
        head: See :func:`trady.analysis.head.find_head`.
        fuse: Whether calls may be computed together and overwrite their inputs.
        modes: Training (True), and evaluation mode (False) if it is to run in that too.

    Raises:
        ModelError: The model cannot be traced, or has nothing to update.

    """
    keep_unpacked(model)
    training = trace_forward(model, example, training=True)
    names = find_head(model, training, head)
    plain = head_parameters(model, names)
    identities = {id(p) for p in plain.values()}
    plans = {True: plan_fusion(training, identities, fuse=fuse)}
    if False in modes:
        plans[False] = plan_fusion(trace_forward(model, example, training=False), identities, fuse=fuse)
    table = build_table(model, training, plans[True], names, activation_dtype(model, example))
    return ModelAnalysis(table, names, plain, plans)


def find_recomputable(
    model: nn.Module, example: Any, analysis: ModelAnalysis
) -> tuple[dict[bool, tuple[Segment, ...]], int]:
    """Find what can be computed anew in the backward pass.

    Returns:
        The segments in training (True) and in evaluation mode (False), and the multiply-adds of a whole
        forward pass.

    """
    doubled = twice(example)
    element_bytes = activation_dtype(model, example).itemsize
    found, work = {}, 0
    for training, plan in analysis.plans.items():
        trace = trace_forward(model, example, training=training)
        try:
            samples = samples_of(trace, trace_forward(model, doubled, training=training))
        except ModelError:  # it takes batches of one size only
            samples = [None] * len(trace.calls)
        found[training] = find_segments(trace, plan, samples, element_bytes)
        work = max(work, sum(work_of(trace, entry) for entry in trace.calls))
    return found, work
