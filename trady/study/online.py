"""Online ranking against offline: what drawn channels reveal about layers, simulated on recorded gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trady.errors import BudgetError
from trady.planning.budget import Budget, parse_budget
from trady.planning.scopes import ELEMENTS
from trady.policies import Draw, get_policy
from trady.ranking.online import OnlineRanking
from trady.ranking.scores import layer_score, spearman, top_layers
from trady.study.records import Records
from trady.study.stability import POOL_SHARE

#: Budgets that are simulated unless others are asked for, as shares of the elements of all channels.
USUAL_SHARES = (0.005, 0.02, 0.1)

#: Numbers of draws, each of one batch, after which the two rankings are compared.
DRAWS = (1, 2, 5, 10, 20, 40, 80)


@dataclass(frozen=True)
class Online:
    """The online ranking after some draws, against the ranking from all gradients; means over the runs.

    Attributes:
        elements: B_mem of each draw.
        draws: Draws so far, one batch each.
        spearman: Mean correlation of layer RGN with that of all gradients of the run.
        spearman_least: The lowest of any run.
        spearman_same_steps: Mean correlation with that of all gradients of the steps that were drawn on, which leaves
            out the ranking's own drift over the run.
        overlap: Mean number of offline top-K layers that are among the online ones.
        k_offline: Mean K of the offline ranking.
        k_online: Mean K of the online one.
    """

    elements: int
    draws: int
    spearman: float
    spearman_least: float
    spearman_same_steps: float
    overlap: float
    k_offline: float
    k_online: float


def budgets_of(records: Records, asked: Sequence[str]) -> tuple[int, ...]:
    """Return the budgets to simulate, in elements.

    Raises:
        BudgetError: One that is asked for is not in elements, or not even one channel of any layer fits in it.
    """
    total = records.table.all_elements
    minimum = min(layer.elements for layer in records.table)
    if not asked:
        return tuple(max(minimum, round(share * total)) for share in USUAL_SHARES)
    found = tuple(elements_of(text).amount for text in asked)
    if small := [amount for amount in found if amount < minimum]:
        raise BudgetError(f"elements:{small[0]} is less than one channel takes; the minimum is elements:{minimum}")
    return found


def elements_of(text: str) -> Budget:
    """Read a budget in elements.

    Raises:
        BudgetError: It is something else.
    """
    budget = parse_budget(text)
    if budget.scope != ELEMENTS:
        raise BudgetError(f"online ranking is simulated in elements; type e.g. elements:27946 instead of {text}")
    return budget


def online(records: Records, budgets: Sequence[int]) -> tuple[Online, ...]:
    """Draw channels of all layers, uniformly and again for each recorded step, and learn from these alone.

    Args:
        records: What was recorded; the draws go through a run's steps in order, and through them again if there are
            more draws than steps.
        budgets: In elements.
    """
    return tuple(point for elements in budgets for point in _at(records, elements))


def _at(records: Records, elements: int) -> list[Online]:
    runs = [_run(records, dataset, seed, elements) for dataset, seed in records.runs]
    found = []
    for at, draws in enumerate(DRAWS):
        agreement, same, overlap, k_offline, k_online = np.array([run[at] for run in runs]).T
        found.append(
            Online(
                elements=elements,
                draws=draws,
                spearman=float(agreement.mean()),
                spearman_least=float(agreement.min()),
                spearman_same_steps=float(same.mean()),
                overlap=float(overlap.mean()),
                k_offline=float(k_offline.mean()),
                k_online=float(k_online.mean()),
            )
        )
    return found


def _run(records: Records, dataset: str, seed: int, elements: int) -> list[tuple[float, float, int, int, int]]:
    table, units = records.table, records.of(dataset, seed)
    offline = records.layer_rgn(units)
    pool = set(top_layers(offline, POOL_SHARE))
    steps = {layer.name: records.steps(units, layer.name) for layer in table}
    count = len(next(iter(steps.values())))
    policy, learnt = get_policy("dynamic-random"), OnlineRanking(table)
    costs = {layer.name: layer.elements for layer in table}
    found = []
    for number in range(max(DRAWS)):
        draw = Draw(table, table.names, costs, elements, seed=seed, epoch=0, redraw=number)
        selection = policy.select(draw)
        learnt.observe({name: steps[name][number % count][channels] for name, channels in selection.items()})
        if number + 1 in DRAWS:
            scores = learnt.ranking().scores
            top = set(top_layers(scores, POOL_SHARE))
            seen = {layer.name: steps[layer.name][: number + 1].mean(0) for layer in table}
            same = [layer_score(seen[layer.name], layer, "rgn") for layer in table]
            learned = [scores[name] for name in table.names]
            agreement = spearman([offline[name] for name in table.names], learned)
            found.append((agreement, spearman(same, learned), len(pool & top), len(pool), len(top)))
    return found
