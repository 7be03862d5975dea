"""The channels that train now, and how the next ones are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trady.channels.selection import Selection
from trady.errors import ModelError, TradyWarning
from trady.evidence.sweeps import Sweeper
from trady.interception.armed import Armed, Change
from trady.model.batch import Loss
from trady.planning.decision import POOL_SHARE, STEPS_A_DRAW, Decision
from trady.planning.spending import Moment
from trady.policies import Evidence
from trady.ranking.online import OnlineRanking
from trady.ranking.ranking import LayerRanking
from trady.tuner.observed import nothing_measured
from trady.tuner.seen import Seen


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a training has come, beside its weights.

    Attributes:
        moment: What draws depend on.
        selection: The channels that train.
        online: The ranking that is being learnt.
        epoch: The epoch that was drawn last.
        redraw: Draws inside of it.
        steps: Optimizer steps that the ranking has seen.
        observed_epoch: The epoch that was drawn from the evidence; ``None`` while it is fresh.
        seen: Steps of the loop that were not planned, and that draws leave room for.
    """

    moment: Moment
    selection: Selection
    online: OnlineRanking | None
    epoch: int
    redraw: int
    steps: int
    observed_epoch: int | None = None
    seen: tuple[Seen, ...] = ()


class Draws:
    """What has been drawn, and what the next draw depends on.

    Args:
        decision: What was decided.
        armed: The armed model.
        changed: Called after a draw with the compact parameters that have changed.

    Attributes:
        planned: What was decided at first.
        decision: The same, with room for what the loop has been seen to do.
        moment: What draws depend on.
        selection: The channels that train.
        touched: Channels that were ever selected.
        epoch: The epoch that was drawn last.
        count: Draws inside of it, beside the first.
        online: The ranking that is being learnt; ``None`` where none is.
        seen: What the loop has been seen to do, and ``decision`` leaves room for.
    """

    def __init__(self, decision: Decision, armed: Armed, changed: Callable[[Sequence[Change]], None]) -> None:
        self.planned = self.decision = decision
        self._armed, self._changed = armed, changed
        self.moment = decision.start
        self.selection, self.touched = Selection(), Selection()
        self.seen: tuple[Seen, ...] = ()
        self.epoch = self.count = 0
        self.online = decision.online_ranking() if decision.start.learns else None
        self._steps, self._full = 0, False
        self._held = [armed.layers[name].compact for name in decision.analysis.held]
        for compact in self._held:  # its weight shows that it does not train
            compact.requires_grad_(False)
        if self._held:
            armed.on_forward.append(self._check_held)
        if decision.needs and not decision.analysis.head_parameters:
            armed.on_forward.append(self._check_something_trains)

    def _check_something_trains(self, module: nn.Module, *_: Any) -> None:
        """Refuse a training pass before anything was measured: nothing of it would have a gradient."""
        trains = module is self._armed.model and module.training and torch.is_grad_enabled()
        if trains and not self._armed.selection.count and self.moment.evidence is None:
            raise nothing_measured(self.decision.policy.name, self.decision.needs, "train")

    def _check_held(self, *_: Any) -> None:
        """Refuse that a layer is to train that was to stay as it is when the model was prepared."""
        if self._armed.selection is not self.selection:  # channels of all layers are being measured
            return
        if any(compact.requires_grad for compact in self._held):
            layers = self._armed.layers
            held = next(name for name in self.decision.analysis.held if layers[name].compact.requires_grad)
            raise ModelError(
                f"{held} was frozen when the model was prepared, and its weight has requires_grad=True now: to let it "
                "train from now on, call tuner.finish() and trady.prepare again; what has trained so far is in the "
                "weights"
            )

    @property
    def ranking(self) -> LayerRanking | None:
        """The ranking in use; while it is being learnt, as far as it is known."""
        return self.moment.ranking if self.online is None else self.online.ranking()

    def of(self, moment: Moment) -> Selection:
        """Draw the channels of the running epoch; none while the policy has nothing to draw from."""
        if self.decision.spending(moment).lacks_evidence:
            return Selection()
        return self.decision.draw(moment, self.epoch, self.count)

    def sweeper(
        self,
        loss: Loss | None,
        progress: Callable[[int, int], None] | None = None,
        numbers: int = 0,
    ) -> Sweeper:
        """Return what sees the gradient of every channel, inside the budget; see :meth:`trady.Tuner.sweeper`."""
        decision = self.decision
        return Sweeper(
            self._armed,
            tuple(decision.analysis.head_parameters.values()),
            decision.sweeps(self.moment, self.selection, numbers),
            loss,
            decision.micro_batch,
            decision.seed,
            progress,
        )

    def resample(self, epoch: int) -> None:
        """Draw the channels of an epoch; a ranking that was being learnt is settled when epoch 1 begins."""
        if epoch > 0:
            self._settle()
        selection = self._with_room(self.decision.draw(self.moment, epoch, 0), epoch)
        self.epoch, self.count = epoch, 0
        self.apply(selection)

    def redraw(self) -> None:
        """Draw the channels of the running epoch again."""
        selection = self._with_room(self.decision.draw(self.moment, self.epoch, self.count + 1), self.epoch)
        self.count += 1
        self.apply(selection)

    def apply(self, selection: Selection) -> Sequence[Change]:
        """Let these channels train from now on; return how the compact parameters changed."""
        changes = self._armed.select(selection)
        self.selection = selection
        self.touched |= selection
        self._changed(changes)
        return changes

    def observed(self, evidence: Evidence) -> None:
        """Take in what was measured for the policy."""
        self.moment = replace(self.moment, evidence=evidence)

    def learn(self, norms: Mapping[str, Any]) -> None:
        """Learn the ranking from the gradients of a step, and draw again every few steps.

        Args:
            norms: Layer name to the squared gradient norms ``[n]`` of its channels.

        """
        if self.online is None or not norms:
            return
        self.online.observe(norms)
        self._steps += 1
        if self.online.settled:
            self._settle()
        elif self._steps % STEPS_A_DRAW:
            return
        self.redraw()

    def _settle(self) -> None:
        """End learning a ranking: the layers that carry the gradient become the pool."""
        if self.online is not None:
            ranking, self.online = self.online.ranking(), None
            self.moment = replace(
                self.moment, ranking=ranking, pool=ranking.top(POOL_SHARE, self.decision.analysis.held), learns=False
            )

    def _with_room(self, drawn: Selection, epoch: int) -> Selection:
        """What was drawn; where the float channels of quantised layers have filled the budget, what trains already."""
        if self.decision.has_room(self.moment, drawn, self._armed.float_channels):
            return drawn
        if not self._full:
            self._full = True
            warnings.warn(
                "quantised layers keep every channel that has trained in floating point, and these have filled the "
                f"budget: from epoch {epoch} on the channels stay those of the last draw. A larger budget, or a "
                "static policy, leaves room",
                TradyWarning,
                stacklevel=4,
            )
        return self.selection

    def progress(self) -> Progress:
        """Return how far the draws have come."""
        moment, online = self.moment, self.online
        return Progress(moment, self.selection, online, self.epoch, self.count, self._steps, seen=self.seen)

    def restore(self, decision: Decision, progress: Progress, touched: Selection) -> None:
        """Go on from there, with what the decision has become since."""
        self.decision, self.seen = decision, progress.seen
        self.moment, self.online = progress.moment, progress.online
        self._armed.interceptor.recompute(self.moment.recomputation.segments)
        self.epoch, self.count, self._steps = progress.epoch, progress.redraw, progress.steps
        self.touched = touched
        self.apply(progress.selection)
