"""Draws of channels inside a budget, and within what a step may take of the operations of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from trady.channels.selection import Selection
from trady.errors import PolicyError
from trady.planning.budget import Budget, infeasible_budget, smallest
from trady.planning.limited_draw import draw_within
from trady.planning.scopes import BudgetScope, DoesNotFitError
from trady.planning.spending import Spending
from trady.planning.step_flops import StepLimit


@dataclass(frozen=True)
class Drawing:
    """What a draw is made with.

    Attributes:
        spending: What selections take, and the policy.
        scope: What the budget bounds.
        budget: Its limit, if there is one.
        steps: Counts what a step takes of the operations of full fine-tuning, and what it may.
        has_head: Whether something trains beside the channels.
    """

    spending: Spending
    scope: BudgetScope
    budget: Budget | None
    steps: StepLimit
    has_head: bool

    def draw(self, epoch: int, redraw: int) -> Selection:
        """Draw the channels of an epoch.

        Raises:
            BudgetError: The policy's selection cannot be made as small as the budget, or is empty where nothing else
                trains.
            PolicyError: It is empty whatever the budget is, and nothing else trains; or the policy is given its
                layers, and the way back to them takes too long.

        """
        amount = None if self.budget is None else self.budget.amount
        selection = self._select(amount, epoch, redraw)
        if not selection.count and self.needs_channels:
            self._refuse_to_train_nothing(epoch, redraw)
        return selection

    @property
    def needs_channels(self) -> bool:
        """Whether nothing trains where no channel does."""
        return not self.has_head and self.spending.policy.name != "head"

    def trains_within(self, amount: int) -> bool:
        """Whether something trains within an amount; always where nothing smaller can be drawn."""
        return not self.needs_channels or self.spending.all_or_nothing or self._within(amount, 0, 0).count > 0

    def least(self, amount: int, epoch: int = 0, redraw: int = 0) -> int | None:
        """Return the smallest amount, from one up that nothing trains in, that a channel trains in, if there is one."""
        return smallest(lambda more: self._within(more, epoch, redraw).count > 0, amount)

    def _within(self, amount: int | None, epoch: int, redraw: int) -> Selection:
        def draw(spending: Spending) -> Selection:
            return self.scope.draw(spending, amount, epoch, redraw)

        return draw_within(self.steps, draw, self.spending, epoch, redraw)

    def _select(self, amount: int | None, epoch: int, redraw: int) -> Selection:
        try:
            return self._within(amount, epoch, redraw)
        except DoesNotFitError as error:
            assert self.budget is not None
            raise infeasible_budget(self.budget, error.amount) from None

    def _refuse_to_train_nothing(self, epoch: int, redraw: int) -> None:
        """Say from what budget on a channel trains."""
        budget = self.budget
        found = None if budget is None else self.least(budget.amount, epoch, redraw)
        if budget is None or found is None:
            raise PolicyError(
                f"policy {self.spending.policy.name!r} draws no channel, whatever the budget is, and this model has no "
                "head, so nothing would train: take another policy, or name modules to train as head=..."
            )
        raise infeasible_budget(budget, found, why=", where a channel trains (it has no head that would)")
