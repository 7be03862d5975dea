"""A training step without memory or arithmetic: the timeline of live bytes, taken on the meta device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trady.analysis.fusion import FusionPlan
from trady.analysis.model_analysis import ModelAnalysis
from trady.analysis.segments import NO_SEGMENTS, Segments
from trady.channels.selection import Selection
from trady.errors import ModelError
from trady.interception.armed import Armed
from trady.memory.live import LiveBytes, Storage
from trady.memory.workspaces import workspace_bytes
from trady.model.batch import Batch
from trady.model.eager import uncompiled
from trady.model.structure import tensors_in
from trady.model.untouched import switch_mode, untouched
from trady.ops.context import internal_query, simulated_autocast
from trady.simulation.fake_run import FakeRun
from trady.simulation.meta_copy import meta_copy
from trady.simulation.optimizer_memory import Form, OptimizerMemory
from trady.simulation.timeline import Interval, Timeline


@dataclass(frozen=True)
class ExampleLoss:
    """The loss of a loop on the example batch.

    Attributes:
        compute: From the model's output to a scalar.
        samples: Samples of the example: labels are cut with it where the model works on a part.
    """

    compute: Callable[[Any], Tensor]
    samples: int

    def of(self, output: Any) -> Tensor:
        """Compute it on an output without memory.

        Raises:
            ModelError: It does not fit the model's output, looks at its values, or is no scalar.

        """
        try:
            loss: Any = self.compute(output)
        except Exception as error:
            raise ModelError(
                f"loss=... cannot be computed from the model's output on the example: {type(error).__name__}: {error}. "
                "It takes the output alone (lambda output: F.mse_loss(output, target)), and must not branch on values"
            ) from error
        if not isinstance(loss, Tensor) or loss.dim():
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ModelError(f"loss=... gives {shape}; it must give a scalar")
        return loss


class Simulator:
    """Follows the live bytes of training steps of one model on one batch, without memory or arithmetic.

    The steps run on a copy of the model that has shapes but no memory. Ids and masks keep their values,
    since models look at them.

    Args:
        model: The model; only read.
        example: One batch.
        analysis: What is known of the model on this batch.
        fidelity: As for :func:`trady.prepare`.
        waiting_bytes: Bytes of a larger batch, and of batches read ahead, that wait while the model works on this one.
        loss: What the step makes of the output; a cross entropy, or the model's own loss, where none is given.
        further: Batches of further forward passes before the backward pass; ``analysis`` has the table of all.
        autocast: What forward passes compute in under autocast; ``None`` is without it.

    """

    def __init__(
        self,
        model: nn.Module,
        example: Batch | Any,
        analysis: ModelAnalysis,
        *,
        fidelity: str = "exact",
        waiting_bytes: int = 0,
        loss: ExampleLoss | None = None,
        further: Sequence[Batch] = (),
        autocast: torch.dtype | None = None,
    ) -> None:
        self._fidelity, self._loss, self._autocast = fidelity, loss, autocast
        self._packed = tuple(each.packed for each in (Batch.of(example), *further))
        self._waiting = torch.empty(waiting_bytes, dtype=torch.uint8, device="meta")
        batch = Batch.of(example, model)
        # A copy shares what functions close over, which may be the model.
        self._model, self._copy = model, meta_copy(model)
        self._full_over_chunk = 1 + waiting_bytes / max(batch.nbytes, 1)
        self._device = batch.device_in(model) or torch.device("meta")
        self._workspaces = torch.empty(workspace_bytes(self._device), dtype=torch.uint8, device="meta")
        self._analysis = analysis.of_copy(model, self._copy)

    def inference_bytes(self) -> tuple[int, int]:
        """Simulate one inference pass of the untouched model.

        Returns:
            Bytes of weights, buffers and batch; and how far the peak is above them.

        """
        live, batch = LiveBytes(), self._packed[0].unpack()
        resident = [*self._copy.parameters(), *self._copy.buffers(), *batch.tensors, self._workspaces]
        args, kwargs = batch.arguments
        with untouched(self._model, self._copy, watches=False) as writes, uncompiled(self._copy):
            try:
                switch_mode(self._copy, False)
            except RuntimeError:  # its own eval() looks at values, which a copy without memory has not
                for module in self._copy.modules():
                    module.training = False
            live.register(resident)
            before = live.current
            plan = self._analysis.plans.evaluation or FusionPlan(())
            plan.draws.arm([self._copy, batch.inputs])
            fake = FakeRun(self._device, live, writes.watching, plan.answers)
            with fake, torch.no_grad(), live, simulated_autocast(self._autocast):
                self._copy(*args, **kwargs)
        return before, live.highest()[0] - before

    def timeline(
        self,
        *,
        layers: Sequence[str] = (),
        segments: Segments = NO_SEGMENTS,
        selection: Selection | None = None,
        parts: bool = False,
        optimizer: OptimizerMemory | None = None,
        again: bool = False,
    ) -> Timeline:
        """Run one step in which one channel of each given layer trains.

        Args:
            layers: Layers that will be drawn from.
            segments: What is recomputed in the backward pass (:func:`trady.analysis.model_analysis.find_recomputable`).
            selection: Channels that train, instead of one of each layer.
            parts: Also say what the peak is made of.
            optimizer: What the optimizer takes; what it keeps is not among the parts.
            again: Whether the peak is that of a second pass, which finds the gradients of the first.

        """
        if selection is None:
            selection = Selection({name: np.zeros(1, dtype=np.int64) for name in layers})
        with untouched(self._model, self._copy, watches=False) as writes:
            armed = Armed(self._copy, self._analysis, segments, self._fidelity)
            try:
                again = parts and again
                return self._follow(armed, writes.watching, selection, parts, optimizer or OptimizerMemory(), again)
            finally:
                armed.disarm()

    def _follow(
        self,
        armed: Armed,
        watching: Callable[[], AbstractContextManager[None]],
        selection: Selection,
        parts: bool,
        optimizer: OptimizerMemory,
        again: bool,
    ) -> Timeline:
        armed.select(selection)
        intervals: list[Interval] = []
        live = LiveBytes()
        made_of: dict[str, int] = {}
        switch_mode(self._copy, True)
        live.register([*self._copy.parameters(), *self._copy.buffers()], "weights")
        batches = [packed.unpack() for packed in self._packed]
        live.register([*(tensor for batch in batches for tensor in batch.tensors), self._waiting], "inputs")
        if self._workspaces.numel():
            live.register([self._workspaces], "workspaces")
        compact = [armed.layers[layer.name].compact for layer in self._analysis.table if layer.name in selection]
        head = tuple(self._analysis.head_parameters.values())
        live.register([*compact, *armed.indices], "compact parameters")

        def cut(phase: str, layer: str) -> None:
            intervals.append(Interval(phase, layer, live.interval_peak()))

        nodes: dict[str, list[weakref.ref[Any]]] = {}

        def ran(layer: str, out: Tensor) -> None:
            forward = torch._C._current_graph_task_id() == -1
            cut("forward" if forward else "recompute", layer)
            if forward and layer in selection and out.grad_fn is not None:
                nodes.setdefault(layer, []).append(weakref.ref(out.grad_fn))
                uses = nodes[layer]
                # Autograd hands over the gradient of all uses of a layer together: until then it keeps that of some.
                # A hook makes it keep more, so a layer that is used once has none.
                for use in () if len(uses) < 2 else uses[-1:] if len(uses) > 2 else uses:
                    if (node := use()) is not None:
                        node.register_hook(lambda *_: cut("gradient", layer))

        def arrived(layer: str, compact: nn.Parameter) -> None:
            if optimizer.in_backward is not None and compact.grad is not None:
                needed = [torch.empty_like(compact.grad) for _ in range(optimizer.in_backward)]
                del needed
                compact.grad = None
            cut("backward", layer)

        plan = self._analysis.plans.training
        for _ in range(plan.rounds):  # for what the model keeps in Python from one to the next
            with armed.interceptor.off(), FakeRun(self._device, None, watching, plan.answers), torch.no_grad():
                args, kwargs = batches[0].arguments
                self._copy(*args, **kwargs)
        fake = FakeRun(self._device, live, watching, plan.answers)
        armed.interceptor.simulate(fake.prepare, ran)
        armed.on_gradient.append(arrived)
        with live:
            armed.interceptor.keep_norms(plan.norms)
            live.interval_peak()
            labels: list[Tensor] = []
            kept = self._forward_and_backward(batches, fake, live, labels)
            cut("end", "")
            cut("step", "")
            if parts:
                if again:
                    kept += self._forward_and_backward(batches, fake, live, labels)
                live.register([p.grad for p in compact if p.grad is not None], "compact gradients")
                live.register([p.grad for p in self._copy.parameters() if p.grad is not None], "gradients")
                moment = optimizer.moment_bytes(form_of(p) for p in (*compact, *head) if p.grad is not None)
                torch.empty(moment, dtype=torch.uint8, device="meta")
                made_of = parts_at_peak(live, kept)
        frees = optimizer.in_backward is not None
        return Timeline(tuple(intervals), self._analysis.table, tuple(map(form_of, head)), made_of, frees)

    def _forward_and_backward(
        self, batches: Sequence[Batch], fake: FakeRun, live: LiveBytes, labels: list[Tensor]
    ) -> list[Storage]:
        """Run one pass; return what was alive in its middle. ``labels`` takes up what the step reads them from."""
        outputs = []
        for batch in batches:
            args, kwargs = batch.arguments
            self._analysis.plans.training.draws.arm([self._copy, batch.inputs])
            fake.begin()
            with fake, simulated_autocast(self._autocast):
                outputs.append(self._copy(*args, **kwargs))
        loss = self._loss_of(outputs, batches[0].samples, fake, labels)
        del outputs
        kept = [storage for storage in live.log if storage.death is None]
        if loss is not None and loss.requires_grad:  # without a head and a channel there is nothing behind it
            with fake:
                run_backward(loss)
        return kept

    def _loss_of(self, outputs: list[Any], samples: int, fake: FakeRun, labels: list[Tensor]) -> Tensor | None:
        if self._loss is not None:
            with fake, fake.cut(self._loss.samples, samples), simulated_autocast(self._autocast):
                return self._loss.of(outputs[0])
        if not labels:
            counts = [math.ceil(label_count(output) * self._full_over_chunk) for output in outputs]
            labels += [torch.empty(count, dtype=torch.int64, device="meta") for count in counts if count]
        losses = [loss for output in outputs if (loss := surrogate_loss(output)) is not None]
        return sum(losses[1:], losses[0]) if losses else None


def form_of(parameter: Tensor) -> Form:
    """Measure a parameter."""
    return Form.of(parameter.shape, parameter.element_size())


def run_backward(loss: Tensor) -> None:
    """Run the backward pass with function modes on, for sections that a model recomputes in it.

    ``loss.backward()`` is itself handled by the modes, which are off meanwhile.
    """
    token = internal_query.set(True)
    try:
        run = torch.autograd.graph._engine_run_backward
        run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        internal_query.reset(token)


def parts_at_peak(live: LiveBytes, kept: Sequence[Storage]) -> dict[str, int]:
    """What the peak is made of; saved is what is alive between forward and backward."""
    _, moment = live.highest()
    saved = {id(storage) for storage in kept}
    found: dict[str, int] = {}
    for storage in live.log:
        if storage.alive_at(moment):
            part = storage.category or ("saved activations" if id(storage) in saved else "temporaries")
            found[part] = found.get(part, 0) + storage.nbytes
    return found


def surrogate_loss(output: Any) -> Tensor | None:
    """A scalar that reaches every output as a cross-entropy would; the model's own loss where it gives one."""
    loss = _own_loss(output)
    if loss is not None:
        return loss
    total: Tensor | None = None
    for tensor in _floats(output):
        term = torch.log_softmax(tensor, -1).mean() if tensor.dim() else tensor
        total = term if total is None else total + term
    return total


def label_count(output: Any) -> int:
    """Labels that the user's loss reads beside the batch: a whole number for each position that has scores.

    Classes are the last dimension of the scores, or the second of maps ``[N, classes, H, W]``. A model that gives its
    own loss has found the labels in the batch.
    """
    if _own_loss(output) is not None:
        return 0
    scores = getattr(output, "logits", None)
    if not isinstance(scores, Tensor):
        scores = next(iter(_floats(output)), None)
    if scores is None or scores.dim() < 2:
        return 0
    return scores.numel() // max(scores.shape[-1 if scores.dim() < 4 else 1], 1)


def _own_loss(output: Any) -> Tensor | None:
    loss = getattr(output, "loss", None) if not isinstance(output, Tensor) else None
    return loss if isinstance(loss, Tensor) else None


def _floats(output: Any) -> list[Tensor]:
    tree = dict(output) if hasattr(output, "keys") else output
    return [t for t in tensors_in(tree) if t.is_floating_point() and t.requires_grad]
