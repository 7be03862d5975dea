"""The ranking measured offline: every channel's gradient, in sweeps that each stay inside a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trady.analysis.model_analysis import ModelAnalysis, analyse_model
from trady.analysis.segments import NO_SEGMENTS
from trady.channels.selection import Selection
from trady.channels.table import ChannelTable
from trady.errors import ModelError, RankingError
from trady.evidence.sweeps import Sweeper, squared_norm
from trady.interception.armed import Armed
from trady.model.batch import Batch, split
from trady.model.eager import unwrap_compiled
from trady.planning.budget import Budget, parse_budget
from trady.planning.decision import sweeps_within
from trady.planning.peaks import Case, Peaks
from trady.planning.recomputation import Planner
from trady.planning.reserve import Reserve
from trady.planning.scopes.unlimited import UNLIMITED
from trady.planning.spending import Moment, Spending
from trady.policies import get_policy
from trady.policies.evidence import Values
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.ranking.scores import Metric, channel_scores, layer_score
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.simulator import Simulator


def rank(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Metric = "rgn",
    *,
    budget: str | Budget | None = None,
    head: str | Sequence[str] | None = "auto",
    norm: Literal["frozen", "batch"] = "frozen",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LayerRanking:
    """Measure which layers are worth updating: layer RGN, equation 8 of arXiv 2510.19675.

    For each layer ``RGN = sum_c ||dL/dW[:, c]|| / (C^W_c + C^A_c)``, where ``W[:, c]`` are the weights that read
    input channel c, ``C^W_c`` is their number, ``C^A_c`` the elements of the channel's activation for one sample, and
    the norm is the root of the mean square over the batches' stochastic gradients. Nothing is updated.

    Args:
        model: The model, in the mode (train or eval) it is to be ranked in.
        batches: Pairs ``(inputs, targets)``, or mappings that the model itself computes a loss from.
        loss: ``loss(outputs, targets)``; ``None`` takes the model's own ``output.loss``.
        metric: ``rgn``, or ``norm`` for the gradient norm without reweighting.
        budget: What one sweep may take (any scope); the channels are then measured in as many sweeps over
            the batches as that needs, with the same result. ``None`` measures all at once.
        head: See :func:`trady.prepare`.
        norm: How batch normalisations run: ``frozen``, with their running statistics, as trady trains; ``batch``,
            with those of the batch, as the paper's authors train. Their running statistics stay as they are.
        seed: Seed of dropout and other randomness, the same for every sweep.
        progress: Called with (steps done, steps in all).

    Returns:
        The ranking, with the mean RGN of every channel.

    Raises:
        BudgetError: Not a single channel fits in the budget.
        ModelError: There is no batch, or no loss, or a layer of which not one channel fits in the budget.

    """
    data = list(batches)
    if not data:
        raise ModelError("there is no batch to rank on; pass at least one (inputs, targets) pair")
    if norm not in ("frozen", "batch"):
        raise RankingError(f"norm={norm!r} is not known; give 'frozen' or 'batch'")
    normalisations = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with _without_running_statistics(normalisations if norm == "batch" else ()):
        table, squared = _squared_norms(model, data, loss, budget, head, seed, progress)
    return LayerRanking(
        scores={layer.name: layer_score(squared[layer.name], layer, metric) for layer in table},
        metric=metric,
        source="measured",
        structure=structure_digest(table),
        channels={layer.name: tuple(channel_scores(squared[layer.name], layer, metric).tolist()) for layer in table},
        batches=len(data),
        elements={layer.name: layer.elements for layer in table},
        norm=norm if normalisations else "",
    )


def _squared_norms(
    model: nn.Module,
    data: Sequence[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    budget: str | Budget | None,
    head: str | Sequence[str] | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[ChannelTable, Values]:
    """Return the layers, and the mean squared norm of each channel's gradient."""
    given, model = model, unwrap_compiled(model)
    batch = Batch.of(split(data[0])[0], model)
    analysis = analyse_model(model, batch, head=head)
    table = analysis.table
    selections = _sweeps(model, batch, analysis, seed, budget)
    _check_complete(table, selections)
    steps = len(selections) * len(data)
    armed = Armed(given, analysis)
    try:
        sweeper = Sweeper(
            armed,
            tuple(analysis.head_parameters.values()),
            selections,
            loss,
            seed=seed,
            progress=None if progress is None else lambda done, _: progress(done, steps),
        )
        return table, sweeper.mean(data, squared_norm).values
    finally:
        armed.disarm()


@contextmanager
def _without_running_statistics(normalisations: Iterable[_BatchNorm]) -> Iterator[None]:
    """Take the running statistics away for a time: a normalisation without them takes those of the batch."""
    kept = [(module, module.running_mean, module.running_var) for module in normalisations]
    try:
        for module, *_ in kept:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def _check_complete(table: ChannelTable, selections: Sequence[Selection]) -> None:
    covered = {name for selection in selections for name in selection}
    if missing := [name for name in table.names if name not in covered]:
        raise ModelError(f"a channel of {missing[0]} alone does not fit in the budget; rank with a larger one")


def _sweeps(
    model: nn.Module, batch: Batch, analysis: ModelAnalysis, seed: int, budget: str | Budget | None
) -> tuple[Selection, ...]:
    """Cut all channels into selections that each fit in the budget, with nothing recomputed."""
    asked, table = None if budget is None else parse_budget(budget), analysis.table
    scope = UNLIMITED if asked is None else asked.scope
    nothing = Planner(NO_SEGMENTS, 0)
    peaks = Peaks((Case(lambda: Simulator(model, batch, analysis), table),), nothing)
    moment = Moment(table.names, nothing.nothing, OptimizerMemory())
    spending = Spending(table, get_policy("full"), seed, peaks, Reserve(table, 1, 0), moment)
    return sweeps_within(table, lambda selection: scope.measuring(spending, selection, 0, table), asked)
