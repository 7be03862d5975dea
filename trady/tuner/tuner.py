"""The tuner: decides, arms a model, draws channels anew, and gives the plain model back."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trady.analysis.model_analysis import ModelAnalysis
from trady.channels.cost import Cost
from trady.channels.selection import Selection
from trady.errors import BudgetError, CheckpointError, ModelError, StateError, TradyWarning
from trady.evidence.measures import MeasureContext, gather_evidence, needs_batches
from trady.evidence.sweeps import Sweeper
from trady.interception.armed import Armed
from trady.memory import Ledger, measure
from trady.model.eager import UNCOMPILED, is_compiled, uncompiled_name, unwrap_compiled
from trady.model.prepared import refuse_prepared
from trady.optim.clipping import clip_channels_
from trady.optim.in_backward import UpdatesInBackward, update_forms
from trady.planning.decision import STEPS_A_DRAW, Decision
from trady.planning.plan import Plan
from trady.policies import Evidence
from trady.quantized.dequantize import dequantize as in_floating_point
from trady.ranking.online import OnlineRanking
from trady.ranking.ranking import LayerRanking, structure_digest
from trady.simulation.optimizer_probe import optimizer_memory
from trady.tuner.batch_check import BatchCheck
from trady.tuner.checkpoint import FORMAT, VERSION, checked_meta
from trady.tuner.delta import changed_tensors, load_changed_tensors
from trady.tuner.gradients import on_host
from trady.tuner.observed import EARLIER, PREFIX, Observed, check_layers
from trady.tuner.optimizer_state import remap_state
from trady.tuner.snapshot import WeightSnapshot

_NO_HEAD = (
    "policy 'head' trains the head alone, and this model has no head: its last layer is a language model's, tied to "
    "another or stored quantised, or head= is empty; name modules as head=..., or take another policy"
)


class Tuner:
    """An armed model. Made by :func:`prepare`; ends with :meth:`finish`."""

    def __init__(self, model: nn.Module, analysis: ModelAnalysis, drawing: Decision, *, example: Any) -> None:
        if drawing.policy.name == "head" and not analysis.head:
            raise ModelError(_NO_HEAD)
        self._examined, self._drawing = analysis, drawing
        selection = drawing.draw(0, 0)
        bounded = drawing.budget is not None and drawing.budget.scope.in_bytes
        refuse_prepared(model)
        if is_compiled(model):
            warnings.warn(UNCOMPILED, TradyWarning, stacklevel=3)
        # In front of the hooks of the interception.
        self._batch_check = BatchCheck(unwrap_compiled(model), example) if bounded else None
        self._armed = Armed(model, analysis, drawing.recomputation.segments, drawing.fidelity)
        self._epoch, self._redraw, self._steps = 0, 0, 0
        self._finished, self._full = False, False
        self._touched = Selection()
        self._norms: dict[str, Any] = {}
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._selection = Selection()
        self._observed = Observed(drawing.policy.name, drawing.needs)
        self._earlier = WeightSnapshot(self._armed, analysis.head_parameters) if drawing.needs_snapshot else None
        self._armed.on_gradient.append(self._gradient_arrived)
        if drawing.needs:
            if not needs_batches(drawing.needs) and not any(p.is_meta for p in model.parameters()):
                self.observe(())
        else:
            self._apply(selection)

    # -- what trains ---------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The armed model: the object that was given to :func:`prepare`."""
        return self._armed.given

    @property
    def selection(self) -> Selection:
        """The channels that train now."""
        return self._selection

    @property
    def ranking(self) -> LayerRanking | None:
        """The ranking in use; while it is being learnt, as far as it is known; ``None`` if none is needed."""
        online = self._drawing.online
        return self._drawing.ranking if online is None else online.ranking()

    @property
    def plan(self) -> Plan:
        """The plan as it stands: after the first epoch with the pool that was learnt."""
        return self._drawing.plan(self._examined.head, self._examined.head_parameters, self._epoch)

    @property
    def micro_batch(self) -> int | None:
        """Samples that a forward and backward pass is to take at a time; ``None`` is the whole batch."""
        return self._drawing.micro_batch

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what an optimizer should get: ``<weight>.channels`` of every layer, then the head's parameters.

        A compact parameter has shape [selected channels, output channels / groups, *kernel]; its object
        stays the same over all draws, its shape does not. Layers without a selected channel have 0 rows.
        """
        for layer in self._examined.table:
            yield f"{layer.parameter}.channels", self._armed.layers[layer.name].compact
        yield from self._examined.head_parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of :meth:`named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    def cost(self) -> Cost:
        """Account for the channels that train now."""
        return self._drawing.cost(self._selection)

    # -- training ------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Follow an optimizer: write its steps back, carry its state over from draw to draw.

        State of channels that leave is dropped, state of channels that stay is kept; a channel that joins
        a layer starts without momentum and with the mean second moment of the channels that stayed.

        Args:
            optimizer: Any ``torch.optim`` optimizer over :meth:`parameters`, or one of :mod:`trady.optim`, which
                from now on updates a layer when its gradient arrives.

        Returns:
            The same optimizer.

        Raises:
            StateError: The tuner is finished, the optimizer has none of the tuner's parameters, or its
                state cannot be carried over (LBFGS).
            BudgetError: The optimizer's state does not fit in the budget.

        """
        self._check_alive("attach an optimizer")
        mine = {id(p) for p in self.parameters()}
        if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            raise StateError("the optimizer has none of the tuner's parameters: build it from tuner.parameters()")
        drawing = self._drawing
        before = drawing.optimizer
        compact = [armed.compact for armed in self._armed.layers.values()]
        forms = update_forms((*self._attached(), optimizer), compact)
        drawing.optimizer = before | replace(optimizer_memory(optimizer), in_backward=forms)
        try:
            drawing.fit_to_budget()
        except BudgetError:
            drawing.optimizer = before
            raise
        self._armed.interceptor.recompute(self._drawing.recomputation.segments)
        self._optimizers.append(weakref.ref(optimizer))
        if isinstance(optimizer, UpdatesInBackward):
            optimizer.take(armed.compact for armed in self._armed.layers.values())
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._apply(self._draw())
        return optimizer

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
            All that is measured so far; ``None`` for a policy that measures nothing.

        Raises:
            StateError: The tuner is finished, or there is no batch.
            BudgetError: Not one channel fits in what the optimizer's state leaves.
            ModelError: There is no loss.

        """
        self._check_alive("observe")
        observed, drawing = self._observed, self._drawing
        if not drawing.needs or (observed.evidence is not None and not drawing.needs.each_epoch):
            return observed.evidence
        first = observed.evidence is None
        earlier = self._earlier
        bench = MeasureContext(
            self._armed,
            lambda numbers: self._sweeper(loss, progress, numbers),
            batches,
            loss,
            observed.evidence,
            nullcontext if earlier is None else earlier.restored,
        )
        observed.evidence, observed.epoch = gather_evidence(drawing.needs, bench), None
        drawing.evidence = observed.evidence
        if earlier is not None:
            earlier.begin()
        if first:
            self._apply(self._draw())
        return observed.evidence

    def sweeper(self, loss: Callable[[Any, Any], Tensor] | None = None) -> Sweeper:
        """Return what sees the gradient of every channel, in as many sweeps as the budget asks for.

        It changes nothing and is good for as long as the optimizer keeps as much state as now.

        Args:
            loss: ``loss(outputs, targets)``, the mean over the samples; ``None`` takes the model's own
                ``output.loss``.

        Raises:
            StateError: The tuner is finished.
            BudgetError: Not one channel fits in what the optimizer's state leaves.

        """
        self._check_alive("sweep")
        return self._sweeper(loss, None)

    def _sweeper(
        self, loss: Callable[[Any, Any], Tensor] | None, progress: Callable[[int, int], None] | None, numbers: int = 0
    ) -> Sweeper:
        return Sweeper(
            self._armed,
            tuple(self._examined.head_parameters.values()),
            self._drawing.sweeps(self._selection, numbers),
            loss,
            self._drawing.micro_batch,
            self._drawing.seed,
            progress,
        )

    def _draw(self) -> Selection:
        """The channels of now; none while the policy has nothing to draw from."""
        if self._drawing.lacks_evidence:
            return Selection()
        return self._drawing.draw(self._epoch, self._redraw)

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
        if epoch > 0:
            self._drawing.settle()
        self._epoch, self._redraw = epoch, 0
        self._apply(self._with_room(self._drawing.draw(epoch, 0)))
        return self._selection

    def _with_room(self, drawn: Selection) -> Selection:
        """What was drawn; where the float channels of quantised layers have filled the budget, what trains already."""
        if self._drawing.has_room(drawn, self._armed.float_channels):
            return drawn
        if not self._full:
            self._full = True
            warnings.warn(
                "quantised layers keep every channel that has trained in floating point, and these have filled the "
                f"budget: from epoch {self._epoch} on the channels stay those of the last draw. A larger budget, or a "
                "static policy, leaves room",
                TradyWarning,
                stacklevel=3,
            )
        return self._selection

    def redraw(self) -> Selection:
        """Draw the channels of the running epoch anew, for epochs that are few and long.

        Call it between ``optimizer.step()`` and the next forward pass. How often it was called since
        :meth:`resample` is part of the state, so every rank and every restart draws the same. A static policy
        draws what it drew before.

        Raises:
            StateError: The tuner is finished, or the policy wants something measured first (:meth:`observe`).

        """
        self._check_alive("redraw")
        self._observed.check_present("redraw")
        self._redraw += 1
        self._apply(self._with_room(self._drawing.draw(self._epoch, self._redraw)))
        return self._selection

    def _apply(self, selection: Selection) -> None:
        changes = self._armed.select(selection)
        for change in changes:
            for optimizer in self._attached():
                remap_state(optimizer, change)
        if self._earlier is not None:
            self._earlier.drawn({change.layer for change in changes})
        self._selection = selection
        self._norms.clear()
        self._touched |= selection

    def _gradient_arrived(self, layer: str, compact: nn.Parameter) -> None:
        gradient = compact.grad
        if gradient is None:
            return
        if self._earlier is not None:
            self._earlier.trained()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            gradient.div_(torch.distributed.get_world_size())
        if self._drawing.online is not None:
            rows = gradient.detach().flatten(1)
            wide = torch.promote_types(rows.dtype, torch.float32)
            self._norms[layer] = torch.linalg.vector_norm(rows, dim=1, dtype=wide).square_()
        # No node of the graph accumulates into a compact parameter, so nobody else runs these hooks.
        for hook in tuple((getattr(compact, "_post_accumulate_grad_hooks", None) or {}).values()):
            hook(compact)
        for optimizer in reversed(self._attached()):
            if isinstance(optimizer, UpdatesInBackward) and compact.grad is not None:
                optimizer.gradient_arrived(compact)

    def _attached(self) -> list[torch.optim.Optimizer]:
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._check_alive("step the optimizer")
        self._observed.check_present("step the optimizer")

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._earlier is not None:
            self._earlier.trained()
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for armed in self._armed.layers.values():
            if armed.selected is not None and id(armed.compact) in stepped:
                # Fused kernels write without saying so.
                torch.autograd.graph.increment_version(armed.compact)
        self._armed.write_back()
        online = self._drawing.online
        if online is None or not self._norms:
            return
        online.observe(on_host(self._norms))
        self._norms.clear()
        self._steps += 1
        if online.settled:
            self._drawing.settle()
        elif self._steps % STEPS_A_DRAW:
            return
        self.redraw()

    def clip_gradients(self, ratio: float | None = 0.1, max_norm: float | None = 2.0) -> float:
        """Clip what ``backward()`` left, so that one learning rate serves every network (:mod:`trady.optim.clipping`).

        Call it between ``backward()`` and ``optimizer.step()``. An optimizer of :mod:`trady.optim` has used the
        gradients of the channels up by then: it clips them itself, with ``channel_clip=ratio``.

        Args:
            ratio: Largest gradient norm of a channel over the channel's own norm; ``None`` leaves channels alone.
            max_norm: Largest gradient norm of the head; ``None`` leaves the head alone.

        Returns:
            The norm of all gradients together, before clipping. A GPU is waited for, once.

        Raises:
            StateError: The tuner is finished, or an attached optimizer has clipped with another ratio.

        """
        self._check_alive("clip gradients")
        in_backward = [optimizer for optimizer in self._attached() if isinstance(optimizer, UpdatesInBackward)]
        for optimizer in in_backward:
            if ratio is not None and not optimizer.clips_channels(ratio):
                raise StateError(
                    "the channels have been updated inside the backward pass: give the optimizer "
                    f"channel_clip={ratio}, or call clip_gradients(ratio=None) to clip the head alone"
                )
        head = list(self._examined.head_parameters.values())
        compact = [armed.compact for armed in self._armed.layers.values() if armed.compact.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in (*compact, *head) if p.grad is not None])
        if ratio is not None:
            clip_channels_(compact, ratio)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(head, max_norm)
        return math.hypot(float(norm), *(used for optimizer in in_backward for used in optimizer.gradient_norms))

    def ledger(self, step: Callable[[], object], *, inference: bool = True) -> Ledger:
        """Measure a training step of this model (see :func:`trady.measure`); the step is executed.

        Args:
            step: Runs forward, backward and the optimizer.
            inference: Also measure one inference pass of the untouched model on the same batch.

        """
        self._check_alive("measure")
        earlier = [] if self._earlier is None else self._earlier.tensors
        return measure(
            step,
            self._armed.model,
            inference=inference,
            compact=[armed.compact for armed in self._armed.layers.values()] + earlier,
            early=[optimizer for optimizer in self._attached() if isinstance(optimizer, UpdatesInBackward)],
            untouched=self.untouched,
        )

    def untouched(self) -> AbstractContextManager[None]:
        """Context in which the model runs as its author wrote it, through PyTorch alone."""
        return self._armed.interceptor.off()

    # -- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a restart needs beside the base model and the optimizer.

        Returns:
            ``tensors``: changed channels and the head; ``meta``: JSON values (selection, epoch, ranking).

        """
        online, ranking = self._drawing.online, self._drawing.ranking
        kept, slices = ({}, None) if self._earlier is None else self._earlier.state()
        earlier = {EARLIER + name: tensor for name, tensor in kept.items()}
        return {
            "tensors": {**self.delta(), **self._observed.tensors(), **earlier},
            "meta": {
                "format": FORMAT,
                "version": VERSION,
                "structure": structure_digest(self._examined.table),
                "policy": self._drawing.policy.name,
                "policy_options": self._drawing.options,
                "seed": self._drawing.seed,
                "epoch": self._epoch,
                "redraw": self._redraw,
                "steps": self._steps,
                **self._drawing.optimizer.state(),
                "pool": list(self._drawing.pool),
                "selection": self._selection.to_json(),
                "ranking": None if ranking is None else ranking.to_json(),
                "online": None if online is None else online.to_json(),
                "observed": self._observed.meta(),
                "earlier": slices,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, on a model as it was before the first step.

        Call it before the optimizer's own ``load_state_dict``.

        Raises:
            CheckpointError: The state is of another model, policy, seed or version, or damaged.
            StateError: The tuner is finished.

        """
        self._check_alive("load a state")
        meta = checked_meta(state)
        drawing = self._drawing
        for what, given, wanted in (
            ("model structure", meta["structure"], structure_digest(self._examined.table)),
            ("policy", meta["policy"], drawing.policy.name),
            ("policy options", meta.get("policy_options", ""), drawing.options),
            ("seed", meta["seed"], drawing.seed),
        ):
            if given != wanted:
                raise CheckpointError(
                    f"the checkpoint is of {what} {given!r}, this run of {wanted!r}; start a new run for it"
                )
        try:
            selection = Selection.from_json(meta["selection"])
            if (mistake := drawing.table.mistake(selection)) is not None:
                raise ValueError(mistake)
            ranking = None if meta["ranking"] is None else LayerRanking.from_json(meta["ranking"])
            online = None if meta["online"] is None else OnlineRanking.from_json(meta["online"], drawing.table)
            pool = tuple(drawing.table[name].name for name in meta["pool"])
            numbers = [int(meta[key]) for key in ("epoch", "redraw", "steps")]
            optimizer = drawing.optimizer.with_state(meta)
            evidence, observed_epoch = self._observed.read(meta.get("observed"), state["tensors"])
            if evidence is not None:
                check_layers(evidence, drawing.table)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint is damaged ({error}); use an older one or start anew") from error
        self._armed.select(Selection())
        try:
            changed = {name: t for name, t in state["tensors"].items() if not name.startswith(PREFIX)}
            touched = load_changed_tensors(self._armed.model, changed)
        except CheckpointError:
            self._armed.select(self._selection)
            raise
        drawing.ranking, drawing.online, drawing.pool = ranking, online, pool
        self._epoch, self._redraw, self._steps = numbers
        drawing.optimizer = optimizer
        if evidence is not None:
            self._observed.evidence, self._observed.epoch = evidence, observed_epoch
            drawing.evidence = evidence
        self._touched = touched.renamed({uncompiled_name(layer.parameter): layer.name for layer in drawing.table})
        self._apply(selection)
        if self._earlier is not None and evidence is not None:
            kept = {k.removeprefix(EARLIER): t for k, t in state["tensors"].items() if k.startswith(EARLIER)}
            self._earlier.load(kept, meta.get("earlier"))

    def delta(self) -> dict[str, Tensor]:
        """Collect what training has changed: the channels that were ever selected, and the head.

        :func:`trady.apply_delta` turns the base model into the fine-tuned one with it; it holds tensors
        only, for safetensors.
        """
        self._check_alive("read the delta")
        self._armed.write_back()
        return changed_tensors(self._armed.model, self._examined.table, self._touched, self._examined.head_parameters)

    def finish(self, *, dequantize: bool = False) -> nn.Module:
        """Give the plain model back: hooks out, flags as they were, trained channels in its weights, compiled again.

        A weight that is stored quantised stays so. The channels of it that have trained lie beside it, in two buffers
        of its module, which computes with them (docs/composition.md).

        Args:
            dequantize: Turn quantised linear layers into plain ones, in floating point (:func:`trady.dequantize`).

        """
        self._check_alive("finish again")
        self._armed.disarm()
        if self._batch_check is not None:
            self._batch_check.remove()
        self._finished = True
        return in_floating_point(self.model) if dequantize else self.model

    def _check_alive(self, wish: str) -> None:
        if self._finished:
            raise StateError(f"cannot {wish}: this tuner is finished; prepare the model again to train on")
