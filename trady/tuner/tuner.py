"""The tuner: decides, arms a model, draws new channels, and gives the plain model back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trady.channels.cost import Cost
from trady.channels.selection import Selection
from trady.errors import StateError, TradyWarning
from trady.evidence.measures import needs_batches
from trady.evidence.sweeps import Sweeper
from trady.interception.armed import Armed, Change
from trady.memory import Ledger
from trady.model.batch import Batch
from trady.model.eager import UNCOMPILED, is_compiled
from trady.model.prepared import refuse_prepared
from trady.optim.in_backward import UpdatesInBackward, update_forms
from trady.planning.decision import Decision
from trady.planning.plan import Plan
from trady.planning.spending import Moment
from trady.policies import Evidence
from trady.quantized.dequantize import dequantize as in_floating_point
from trady.ranking.ranking import LayerRanking
from trady.simulation.optimizer_probe import optimizer_memory
from trady.tuner.adoption import Optimizers, innermost
from trady.tuner.capture import CapturedStep, Surroundings
from trady.tuner.checkpoint import load_state, save_state
from trady.tuner.delta import changed_tensors
from trady.tuner.draws import Draws
from trady.tuner.gradients import Arrivals, clip_all, note_writes
from trady.tuner.guard import Guard
from trady.tuner.measured import measured_step
from trady.tuner.observed import EvidenceState
from trady.tuner.parts import parts_of
from trady.tuner.snapshot import WeightSnapshot


class Tuner:
    """An armed model: the state of a training. Made by :func:`trady.prepare`; ends with :meth:`finish`."""

    def __init__(self, decision: Decision) -> None:
        decision.check_something_trains()
        selection = decision.draw(decision.start, 0, 0)
        model = decision.model
        refuse_prepared(model)
        if is_compiled(model):
            warnings.warn(UNCOMPILED, TradyWarning, stacklevel=3)
        segments = decision.start.recomputation.segments
        self._armed = Armed(model, decision.analysis, segments, decision.fidelity)
        self._finished = self._restoring = False
        self._plan: tuple[Moment, int, Plan] | None = None
        self._draws = Draws(decision, self._armed, self._drawn)
        self._observed = EvidenceState(decision.policy.name, decision.needs)
        head = self._examined.head_parameters
        self._attached = Optimizers(self._armed, head.values())
        self._snapshot = WeightSnapshot(self._armed, head) if decision.needs_snapshot else None
        self._arrivals = Arrivals(self._armed, self._draws, self._attached, head, self._snapshot)
        bounded = decision.budget is not None and decision.scope.in_bytes
        self._guard = Guard(self._armed, self._draws, self.parameters()) if bounded else None
        if decision.needs:
            if not needs_batches(decision.needs) and not any(p.is_meta for p in model.parameters()):
                self.observe(())
        else:
            self._draws.apply(selection)

    # -- what trains ---------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The armed model: the object that was given to :func:`prepare`."""
        return self._armed.given

    @property
    def selection(self) -> Selection:
        """The channels that train now."""
        return self._draws.selection

    @property
    def ranking(self) -> LayerRanking | None:
        """The ranking in use; while it is being learnt, as far as it is known; ``None`` if none is needed."""
        return self._draws.ranking

    @property
    def plan(self) -> Plan:
        """The plan as it stands: after the first epoch with the pool that was learnt."""
        moment, epoch = self._draws.moment, self._draws.epoch
        if self._plan is None or self._plan[0] is not moment or self._plan[1] != epoch:
            self._plan = moment, epoch, self._decision.plan(moment, epoch)
        return self._plan[2]

    @property
    def micro_batch(self) -> int | None:
        """Samples that a forward and backward pass is to take at a time; ``None`` is the full batch."""
        return self._draws.decision.micro_batch

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what an optimizer should get: ``<weight>.channels`` of every layer, then the head's parameters.

        A compact parameter has shape [selected channels, output channels / groups, *kernel]; its object
        stays the same over all draws, its shape does not. Layers without a selected channel have 0 rows.
        """
        for layer in self._decision.table:
            yield f"{layer.parameter}.channels", self._armed.layers[layer.name].compact
        yield from self._examined.head_parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of :meth:`named_parameters`."""
        return (each for _, each in self.named_parameters())

    _decision = property(lambda self: self._draws.decision)
    _examined = property(lambda self: self._decision.analysis)
    _compact = property(lambda self: [armed.compact for armed in self._armed.layers.values()])

    def cost(self) -> Cost:
        """Account for the channels that train now."""
        return self._draws.decision.cost(self._draws.moment, self._draws.selection)

    # -- training ------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Follow an optimizer: write its steps back, carry its state over from draw to draw.

        State of channels that leave is dropped, state of channels that stay is kept; a channel that joins
        a layer starts without momentum and with the mean second moment of the channels that stayed.

        Args:
            optimizer: Any ``torch.optim`` optimizer over :meth:`parameters`, or one of :mod:`trady.optim`, which
                from now on updates a layer when its gradient arrives. In one over the model's own parameters, made
                before or after the model was prepared, each weight gives its place to its channels, and what is
                frozen is dropped. Of a wrapper, the optimizer inside is attached.

        Returns:
            What was given.

        Raises:
            StateError: The tuner is finished, the optimizer has none of the tuner's parameters, or its
                state cannot be carried over (LBFGS).
            BudgetError: The optimizer's state does not fit in the budget. The tuner is as it was before.
        """
        self._check_alive("attach an optimizer")
        given, optimizer = optimizer, innermost(optimizer)
        with self._attached.adopting(optimizer, given):
            forms = update_forms((*self._attached(), optimizer), self._compact)
            needed = self._draws.moment.optimizer | replace(optimizer_memory(optimizer), in_backward=forms)
            moment = self._decision.fit_to_budget(replace(self._draws.moment, optimizer=needed))
            selection = self._draws.of(moment)
        # What can be refused was: from here on all goes through.
        self._draws.moment = moment
        self._armed.interceptor.recompute(moment.recomputation.segments)
        if isinstance(optimizer, UpdatesInBackward):
            optimizer.take(self._compact)
        self._attached.watch(optimizer, self._before_step, self._after_step)
        self._draws.apply(selection)
        return given

    def micro_batches(self, inputs: Any, *others: Any) -> Iterator[tuple[Any, ...]]:
        """Cut a batch into parts that fit: for training or, under ``torch.no_grad()``, for inference (docs/budgets.md).

        Args:
            inputs: What the model is called with, as in :func:`prepare`.
            others: What is cut with it: labels, for instance.

        Returns:
            For each part: inputs, others, and its share of the samples. The mean loss of each part, times its share,
            adds up to the loss of the whole batch, and so do the gradients.

        Raises:
            BudgetError: Not even one sample fits.
        """
        self._check_alive("cut a batch")
        batch = Batch.of(inputs, self._armed.model)
        size = self.micro_batch if self._guard is None else self._guard.part_size(batch)
        return self._arrivals.reduction.but_for_the_last(parts_of((inputs, *others), size))

    def no_sync(self) -> AbstractContextManager[None]:
        """Context for all backward passes of a step but the last: gradients add up in each process, not averaged."""
        return self._arrivals.reduction.no_sync()

    @property
    def observation_due(self) -> bool:
        """Whether the policy wants something measured before the next epoch is drawn: :meth:`observe`."""
        return self._observed.due

    def observe(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evidence | None:
        """Measure what the policy draws from, inside the budget; the next :meth:`resample` uses it.

        The channels are measured in as many sweeps over a batch as the budget asks for. No weight, gradient,
        optimizer state or random number changes, and the selection stays; only where none was drawn yet for lack
        of evidence, it is drawn now. A policy that measures nothing, or has measured once and for all, looks at
        no batch. Over several processes the measurements are averaged.

        Args:
            batches: Pairs ``(inputs, targets)``, or mappings that the model itself computes a loss from; each is
                looked at once, none is kept.
            loss: ``loss(outputs, targets)``, the mean over the samples; ``None`` takes the model's own
                ``output.loss``.
            progress: Called with (passes done, passes of the batches so far).

        Returns:
            All that is measured so far, if anything.

        Raises:
            StateError: The tuner is finished, or there is no batch.
            BudgetError: Not one channel fits in what the optimizer's state leaves.
            ModelError: There is no loss.
        """
        self._check_alive("observe")
        if not (observed := self._observed).wanted:
            return observed.evidence
        first = observed.evidence is None
        sweeper = partial(self._draws.sweeper, loss, progress)
        room = partial(self._decision.room, self._draws.moment, self._draws.selection)
        evidence = observed.gather(self._armed, sweeper, batches, loss, self._snapshot, room)
        self._draws.observed(evidence)
        if first:
            self._draws.apply(self._draws.of(self._draws.moment))
        return evidence

    def sweeper(self, loss: Callable[[Any, Any], Tensor] | None = None) -> Sweeper:
        """Return what sees the gradient of every channel, in as many sweeps as the budget asks for.

        It changes nothing, until the optimizer keeps more state. ``loss`` and errors are those of :meth:`observe`.
        """
        self._check_alive("sweep")
        return self._draws.sweeper(loss)

    def resample(self, epoch: int) -> Selection:
        """Draw the channels of an epoch.

        A pure function of seed, epoch, model and what the policy has learnt: every rank and every restart
        draws the same. A ranking that was being learnt is settled when epoch 1 begins.

        Args:
            epoch: From 0.

        Raises:
            StateError: The tuner is finished, or the policy wants something measured first (:meth:`observe`).
        """
        self._check_alive("resample")
        self._observed.draw_for(epoch)
        self._draws.resample(epoch)
        return self._draws.selection

    def redraw(self) -> Selection:
        """Draw the channels of the running epoch again, for epochs that are few and long.

        Call it between ``optimizer.step()`` and the next forward pass. How often it was called since
        :meth:`resample` is part of the state, so every rank and every restart draws the same. A static policy
        draws what it drew before.

        Raises:
            StateError: The tuner is finished, or the policy wants something measured first (:meth:`observe`).
        """
        self._check_alive("redraw")
        self._observed.check_present("redraw")
        self._draws.redraw()
        return self._draws.selection

    def _drawn(self, changes: Sequence[Change]) -> None:
        (self._attached.restored if self._restoring else self._attached.drawn)(changes)
        if self._snapshot is not None:
            self._snapshot.drawn({change.layer for change in changes})
        self._arrivals.forget()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._check_alive("step the optimizer")
        self._observed.check_present("step the optimizer")
        self._attached.before_step()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._snapshot is not None:
            self._snapshot.trained()
        note_writes(optimizer, self._compact)
        self._attached.after_step(optimizer)
        self._armed.write_back()
        self._draws.learn(self._arrivals.take_norms())

    def clip_gradients(self, ratio: float | str | None = "auto", max_norm: float | None = 2.0) -> float:
        """Clip what ``backward()`` left, so that one learning rate serves every network (:mod:`trady.optim.clipping`).

        Call it between ``backward()`` and ``optimizer.step()``. An optimizer of :mod:`trady.optim` has used the
        gradients of the channels up by then: it clips them itself, with ``channel_clip=ratio``.

        Args:
            ratio: Largest gradient norm of a channel over its own norm (docs/optimizers.md); ``None`` leaves it.
            max_norm: Largest gradient norm of the head; ``None`` leaves the head alone.

        Returns:
            The norm of all gradients together, before clipping. A GPU is waited for, once.

        Raises:
            StateError: The tuner is finished, or an attached optimizer has clipped with another ratio.
        """
        self._check_alive("clip gradients")
        self._arrivals.reduction.reduce()  # what the last backward pass has left under no_sync()
        return clip_all(self._compact, self._examined, self.selection, self._attached(), ratio, max_norm)

    def ledger(self, step: Callable[[], object], *, inference: bool = True) -> Ledger:
        """Measure a training step of this model (see :func:`trady.measure`); the step is executed.

        Args:
            step: Runs forward, backward and the optimizer.
            inference: Also measure one inference pass of the untouched model on the same batch.
        """
        self._check_alive("measure")
        about = self._armed, self._attached, self._snapshot, self._arrivals.reduction
        return measured_step(step, *about, inference=inference, untouched=self.untouched)

    def capture(self, step: Callable[..., Any]) -> CapturedStep:
        """Return ``step``, a forward and backward pass on a batch that it takes, as one that is replayed.

        It is recorded as a CUDA graph once a draw, or runs as it is, and a warning says why (docs/capture.md).
        """
        self._check_alive("capture a step")
        head = tuple(self._examined.head_parameters.values())
        about = Surroundings(self._armed, self._draws, self._attached, self._observed, self._snapshot, head)
        return CapturedStep(step, about)

    def untouched(self) -> AbstractContextManager[None]:
        """Context in which the model runs as its author wrote it, through PyTorch alone."""
        return self._armed.interceptor.off()

    # -- state ---------------------------------------------------------------------------------------

    def state_dict(self, *, lazily: bool = False) -> dict[str, Any]:
        """Everything a restart needs beside the base model and the optimizer.

        Args:
            lazily: Copy a tensor when it is asked for (:attr:`changed`).

        Returns:
            ``tensors``: changed channels and the head; ``meta``: JSON values (selection, epoch, ranking).
        """
        state = save_state(self._decision, self._draws, self._observed, self._snapshot, self.changed)
        return state if lazily else {**state, "tensors": dict(state["tensors"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, on a model as it was before the first step.

        The optimizer's own ``load_state_dict`` may come before or after it.

        Raises:
            CheckpointError: The state is of another model, policy, seed or version, or damaged.
        """
        self._check_alive("load a state")
        self._restoring = True
        try:
            load_state(self._armed, self._draws, self._observed, self._snapshot, state)
        finally:
            self._restoring = False

    @property
    def changed(self) -> Mapping[str, Tensor]:
        """What :meth:`delta` collects, each tensor copied when it is asked for, as for a file."""
        self._check_alive("read the delta")
        self._armed.write_back()
        head = self._examined.head_parameters
        return changed_tensors(self._armed.model, self._decision.table, self._draws.touched, head)

    def delta(self) -> dict[str, Tensor]:
        """Collect what training has changed: the channels that were ever selected, and the head.

        :func:`trady.apply_delta` turns the base model into the fine-tuned one with it; it holds tensors only.
        """
        return dict(self.changed)

    def finish(self, *, dequantize: bool = False) -> nn.Module:
        """Give the plain model back: hooks out, flags as they were, trained channels in its weights, compiled again.

        A weight that is stored quantised stays so, with its trained channels beside it (docs/composition.md).

        Args:
            dequantize: Turn quantised linear layers into plain ones, in floating point (:func:`trady.dequantize`).
        """
        self._check_alive("finish again")
        self._attached.end()
        self._armed.disarm()
        self._finished = True
        if self._snapshot is not None:
            self._snapshot.forget()
        return in_floating_point(self.model) if dequantize else self.model

    def _check_alive(self, wish: str) -> None:
        if self._finished:
            raise StateError(f"cannot {wish}: this tuner is finished; prepare the model again to train on")
