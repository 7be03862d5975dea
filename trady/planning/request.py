"""From what was asked for to a decision: how large a part of the batch, and what else would do if nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from trady.analysis.model_analysis import ModelAnalysis, analyse_model, find_recomputable
from trady.errors import BudgetError, ModelError
from trady.model.batch import batch_size, part_of, waiting_bytes
from trady.model.eager import unwrap_compiled
from trady.ops.smooth import FIDELITIES
from trady.planning.alternatives import alternatives
from trady.planning.budget import Budget, InfeasibleBudgetError, Scope, infeasible_budget, parse_budget
from trady.planning.decision import Decision
from trady.planning.micro_batch import samples_at_once
from trady.planning.plan import Plan
from trady.planning.recomputation import MODES, Planner
from trady.planning.rules import Rules
from trady.policies import Policy, get_policy
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.simulation.optimizer_memory import OptimizerMemory
from trady.simulation.simulator import ExampleLoss

#: A peak that everything fits in.
_BOUNDLESS = Budget(Scope.PEAK, 2**62)


@dataclass(frozen=True)
class Request:
    """What a user asks of :func:`trady.prepare`, without the model and its batch; see there."""

    budget: str | int | Budget | None = None
    policy: str | Policy = "trady"
    ranking: LayerRanking | str | None = None
    head: str | Sequence[str] | None = "auto"
    seed: int = 0
    plan: Plan | None = None
    fuse: bool = True
    recompute: str = "auto"
    fidelity: str = "exact"
    micro_batch: int | str | None = None
    loss: Callable[[Any], Tensor] | ExampleLoss | None = None

    def decide(
        self, model: nn.Module, example: Any, *, optimizer: OptimizerMemory | None = None, explain: bool = True
    ) -> tuple[nn.Module, ModelAnalysis, Decision]:
        """Examine the model and decide; nothing is changed yet.

        Args:
            model: The model.
            example: A whole batch.
            optimizer: What the optimizer will take, as far as it is known.
            explain: Whether a refusal says what would take less, which has to be simulated.

        Raises:
            BudgetError: The budget cannot be read, or is below the least possible.

        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}; trady fine-tunes torch.nn.Module objects")
        given, model = model, unwrap_compiled(model)
        if self.loss is not None and not isinstance(self.loss, ExampleLoss):
            told = replace(self, loss=ExampleLoss(self.loss, batch_size(example)))
            return told.decide(given, example, optimizer=optimizer, explain=explain)
        refused: InfeasibleBudgetError | None = None
        sizes = (None,) if self.micro_batch is None else samples_at_once(example, self.micro_batch)
        for size in sizes:
            try:
                analysis, drawing = self._decide(model, example, size, optimizer)
                drawing.draw(0, 0)  # a policy that trains everything may find only now that it does not fit
                return given, analysis, drawing
            except InfeasibleBudgetError as error:
                refused = error
        assert refused is not None
        if not explain or refused.budget.scope is not Scope.PEAK:
            raise refused
        less = alternatives(
            model,
            example if sizes[-1] is None else part_of(example, 0, sizes[-1]),
            self.recompute,
            lambda model, batch, recompute: self._least_bytes(model, batch, recompute, optimizer),
            refused.least_amount,
        )
        raise infeasible_budget(refused.budget, refused.least_amount, less) from None

    def _decide(
        self, model: nn.Module, example: Any, size: int | None, optimizer: OptimizerMemory | None
    ) -> tuple[ModelAnalysis, Decision]:
        rules = self._rules()
        whole = size is None or size >= batch_size(example)
        part = example if size is None or whole else part_of(example, 0, size)
        head = self.head if self.plan is None else self.plan.head
        analysis = analyse_model(model, part, head=head, fuse=self.fuse)
        if self.plan is not None and structure_digest(self.plan.table) != structure_digest(analysis.table):
            raise ModelError(
                f"the plan is for a {self.plan.model} with other layers than this {type(model).__name__}; "
                "make a new one with trady.plan"
            )
        recomputes = self.fuse and self.recompute != "none"
        planner = Planner(*find_recomputable(model, part, analysis)) if recomputes else Planner({}, 0)
        waiting = 0 if whole else waiting_bytes(example, part)
        drawing = Decision(model, part, analysis, rules, planner, waiting, optimizer)
        drawing.micro_batch = None if whole else size
        return analysis, drawing

    def _rules(self) -> Rules:
        """Read and check what does not depend on the model; an earlier plan goes before."""
        for name, given, known in (("recompute", self.recompute, MODES), ("fidelity", self.fidelity, FIDELITIES)):
            if given not in known:
                raise BudgetError(f"{name}={given!r} is not known; type one of {', '.join(map(repr, known))}")
        budget, policy, seed, pool = self.budget, self.policy, self.seed, None
        if self.plan is not None:
            budget, seed = self.plan.budget if budget is None else budget, self.plan.seed
            policy = policy if getattr(policy, "name", None) == self.plan.policy else self.plan.policy
            pool = self.plan.pool if self.plan.ranking not in ("online", "none") else None
        asked = None if budget is None else parse_budget(budget)
        loss = self.loss if isinstance(self.loss, ExampleLoss) else None
        return Rules(
            asked, get_policy(policy), self.ranking, pool, seed, self.fuse, self.recompute, self.fidelity, loss
        )

    def _least_bytes(self, model: nn.Module, batch: Any, recompute: str, optimizer: OptimizerMemory | None) -> int:
        request = replace(self, budget=_BOUNDLESS, recompute=recompute, plan=None, micro_batch=None)
        return request._decide(model, batch, None, optimizer)[1].least_peak()
