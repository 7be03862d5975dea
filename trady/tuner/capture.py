"""A forward and backward pass recorded once a draw as a CUDA graph, and replayed: the host launches one thing a step.

Everything that a pass decides on the host (which channels, what is recomputed, what is overwritten) depends on shapes
and the draw alone, so the kernels of one step are those of the next. Optimizers, schedules and clipping stay outside:
they run as ever, on gradients that lie where they lay before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from trady.errors import StateError, TradyWarning
from trady.interception.armed import Armed
from trady.model.batch import tensors_among
from trady.optim.in_backward import UpdatesInBackward
from trady.process.ranks import processes
from trady.tuner.draws import Draws
from trady.tuner.observed import EvidenceState
from trady.tuner.snapshot import WeightSnapshot

#: Passes that run as ever before one is recorded, so that libraries and allocators have made what they need.
WARM_UP = 2


class Graph(Protocol):
    """What records kernels and launches them again."""

    def record(self, run: Callable[[], Any]) -> Any:
        """Record what ``run`` launches, without running it; return what it returned."""

    def replay(self) -> None:
        """Launch it all again, on the same memory."""


class CudaGraph:
    """A graph of the current CUDA device."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], Any]) -> Any:
        """Record on a stream of its own; threads of data loaders may pin memory meanwhile."""
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()

    @staticmethod
    @contextmanager
    def beside(device: torch.device) -> Iterator[None]:
        """Context on another stream: what runs there leaves no traces in a later recording."""
        now, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        beside.wait_stream(now)
        with torch.cuda.stream(beside):
            yield
        now.wait_stream(beside)


@dataclass(frozen=True)
class Surroundings:
    """What a captured pass asks of its tuner.

    Attributes:
        armed: The armed model.
        draws: What trains.
        attached: The optimizers of now.
        observed: What the policy has measured.
        snapshot: Is told that weights may change from now on.
        head: The head's parameters.
    """

    armed: Armed
    draws: Draws
    attached: Callable[[], Sequence[torch.optim.Optimizer]]
    observed: EvidenceState
    snapshot: WeightSnapshot | None
    head: Sequence[nn.Parameter]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Compact parameters of layers that train, and the head."""
        layers = self.armed.layers.values()
        return [*(layer.compact for layer in layers if layer.selected is not None), *self.head]

    def obstacle(self) -> str | None:
        """Why no pass can be recorded; ``None`` if one can."""
        if any(isinstance(optimizer, UpdatesInBackward) for optimizer in self.attached()):
            return "its optimizer updates inside the backward pass, at the rate of the moment"
        if processes() > 1:
            return "its gradients are averaged over processes inside the backward pass"
        return None

    def state(self, written: Collection[int]) -> tuple[object, ...]:
        """What the recorded kernels depend on besides the values of a batch.

        Args:
            written: ``id`` of the buffers that a pass writes to.

        """
        model, trained = self.armed.model, self.trained
        # These are written to after every step, by the optimizer; the others by nobody whom the kernels know.
        stepped = {*map(id, trained), *(id(layer.weight) for layer in self.armed.layers.values()), *written}
        return (
            self.draws.selection,
            self.draws.moment.recomputation,
            tuple(module.training for module in model.modules()),
            tuple(p.data_ptr() for p in trained),
            tuple(
                (t.data_ptr(), None if id(t) in stepped else t._version)
                for t in (*model.parameters(), *model.buffers())
            ),
        )


class CapturedStep:
    """A forward and backward pass of an armed model that is replayed where it can be; made by ``Tuner.capture``.

    Args:
        step: Forward and backward; takes a batch, returns tensors such as the loss.
        surroundings: What it asks of the tuner.
        graph: What records.

    Attributes:
        reason: Why passes run uncaptured at the moment; ``None`` while they are replayed.
    """

    def __init__(
        self, step: Callable[..., Any], surroundings: Surroundings, graph: Callable[[], Graph] | None = None
    ) -> None:
        self.reason: str | None = "no pass has run yet"
        self._step, self._about = step, surroundings
        self._new_graph: Callable[[], Graph] = graph or CudaGraph
        self._simulated = graph is not None
        self._recorded: _Recorded | None = None
        self._seen: tuple[object, int] = (None, 0)
        self._refused: str | None = None
        self._said: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step's forward and backward pass; gradients are in ``.grad`` afterwards, as ever.

        Args:
            args: What the step takes. Tensors are copied to where those of the recorded pass lay.
            kwargs: The same, by name.

        Returns:
            What the step returned; tensors are copies without a graph.

        """
        leaves, spec = tree_flatten((args, kwargs))
        obstacle = self._refused or self._about.obstacle() or self._device_lacks(leaves)
        if obstacle is not None:
            self._recorded = None
            return self._run(obstacle, args, kwargs)
        shapes = _shapes(leaves, spec)
        if self._recorded is not None and self._recorded.state != self._about.state(self._recorded.written):
            self._recorded, self._seen = None, (None, 0)
        if self._about.draws.online is not None or self._about.observed.due:
            return self._run("the passes of now are being learnt from", args, kwargs, say=False)
        if self._recorded is None:
            before, count = self._seen
            self._seen = shapes, count + 1 if before == shapes else 1
            if self._seen[1] <= WARM_UP:
                return self._run("the first passes of a draw warm up", args, kwargs, say=False)
            if not self._record(shapes, args, kwargs):
                return self._run(self._refused or "", args, kwargs)
        assert self._recorded is not None
        if self._recorded.shapes != shapes:
            return self._run("its batch is not of the recorded shape", args, kwargs)
        self.reason = None
        if self._about.snapshot is not None:
            self._about.snapshot.trained()
        return self._recorded.replay(leaves)

    def _run(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, say: bool = True) -> Any:
        """Run the step as it is, and say once why."""
        self.reason = reason
        if say and reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"a step runs uncaptured: {reason}", TradyWarning, stacklevel=3)
        with _without_optimizer(), self._beside():
            result = self._step(*args, **kwargs)
        return tree_map_only(Tensor, Tensor.detach, result)

    def _beside(self) -> AbstractContextManager[None]:
        device = next(self._about.armed.model.parameters()).device
        return CudaGraph.beside(device) if device.type == "cuda" else nullcontext()

    def _device_lacks(self, leaves: list[Any]) -> str | None:
        if self._simulated:
            return None
        devices = {t.device for t in (*self._about.armed.model.parameters(), *tensors_among(leaves))}
        if {device.type for device in devices} == {"cuda"} and len(devices) == 1:
            return None
        return (
            f"CUDA graphs need model and batch on one CUDA device, they are on {', '.join(sorted(map(str, devices)))}"
        )

    def _record(self, shapes: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        trained, buffers = self._about.trained, list(self._about.armed.model.buffers())
        held, versions = [p.grad for p in trained], [buffer._version for buffer in buffers]

        @cache  # a tensor that is in the batch twice, such as ids that are their own labels, stays one
        def static(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        inputs = tree_map_only(Tensor, static, (args, kwargs))
        for parameter in trained:
            parameter.grad = None
        try:
            graph = self._new_graph()
            with _without_optimizer():
                result = graph.record(lambda: self._step(*inputs[0], **inputs[1]))
        except StateError:
            raise
        except Exception as error:
            said = str(error).partition("\n")[0]
            self._refused = f"it cannot be recorded ({type(error).__name__}: {said})"
            return False
        else:
            written = {id(b) for b, version in zip(buffers, versions, strict=True) if b._version != version}
            pieces = (graph, self._about.state(written), written, shapes, inputs, result, trained)
            self._recorded = _Recorded(*pieces, [p.grad for p in trained])
            return True
        finally:
            for parameter, gradient in zip(trained, held, strict=True):
                parameter.grad = gradient


class _Recorded:
    """A graph, and the memory that it reads and writes."""

    def __init__(
        self,
        graph: Graph,
        state: object,
        written: set[int],
        shapes: object,
        inputs: Any,
        result: Any,
        trained: list[nn.Parameter],
        gradients: list[Tensor | None],
    ) -> None:
        self.state, self.written, self.shapes = state, written, shapes
        self._graph, self._inputs = graph, tree_flatten(inputs)[0]
        self._result, self._trained, self._gradients = result, trained, gradients

    def replay(self, leaves: list[Any]) -> Any:
        """Run on other values; add the gradients to those that are there."""
        pairs = {id(to): (to, value) for to, value in zip(self._inputs, leaves, strict=True) if isinstance(to, Tensor)}
        with torch.no_grad():
            for to, value in pairs.values():
                to.copy_(value, non_blocking=True)
            before = [
                p.grad.clone() if p.grad is not None and p.grad is made else p.grad
                for p, made in zip(self._trained, self._gradients, strict=True)
            ]
            self._graph.replay()
            for parameter, made, earlier in zip(self._trained, self._gradients, before, strict=True):
                if made is not None:
                    parameter.grad = made if earlier is None else made.add_(earlier)
        return tree_map_only(Tensor, lambda t: t.detach().clone(), self._result)


def _shapes(leaves: list[Any], spec: TreeSpec) -> tuple[object, ...]:
    """What two batches must have in common: all but the values of their tensors, and which of those are one."""
    places = {id(x): place for place, x in reversed(list(enumerate(leaves))) if isinstance(x, Tensor)}
    found = ((tuple(x.shape), x.dtype, x.stride(), places[id(x)]) if isinstance(x, Tensor) else x for x in leaves)
    return (spec, *found)


@contextmanager
def _without_optimizer() -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise StateError(
            "the captured step calls optimizer.step(): a recorded pass would keep its rate. Capture forward and "
            "backward alone, and call optimizer.step() behind"
        )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
