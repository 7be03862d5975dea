"""A segment of calls of which only the inputs are kept: computed in chunks of the batch, and again backward.

For a program ``y = f(x, w)`` that treats samples one by one, forward computes ``f`` on a few samples at a
time and keeps ``x``; backward computes ``f`` on the same samples once more, this time with a graph, and sends
their gradient through it. Never more than one chunk's graph is alive. Exact: no value is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from trady.ops.context import (
    internal_query,
    label_saved,
    samples_under_way,
    simulated_autocast,
    simulated_autocast_dtype,
)
from trady.ops.layout import unviewed
from trady.ops.once import apply, once_differentiable
from trady.ops.sample_axis import SampleAxis


@dataclass
class Chunk:
    """Some samples of the batch.

    Attributes:
        start: Index of the first.
        samples: How many.
        full: Whether they are the full batch.
    """

    start: int
    samples: int
    full: bool

    def of(self, tensor: Tensor, axis: SampleAxis | None) -> Tensor:
        """These samples of a tensor; all of a tensor without a sample axis."""
        if axis is None or self.full:
            return tensor
        return tensor.narrow(axis.dim, self.start * axis.per_sample, self.samples * axis.per_sample)


@dataclass
class Recipe:
    """How a segment is computed.

    Attributes:
        run: Takes the inputs and a chunk; returns the outputs, in order. ``backward`` says that their values are
            not needed, only their graph.
        input_axes: Where the samples lie in each input.
        output_axes: Where they lie in each output; ``None`` for a sum over samples.
        batch: Samples in the batch.
        samples_at_once: Samples in a chunk.
        averages: Whether the last two outputs are a sum and what it is to be divided by.
        leaves: Compact parameters, which receive a gradient too.
        draws: Whether random numbers are drawn.
        check: Called before anything is computed backward.
    """

    run: Callable[[list[Tensor], Chunk, bool], list[Tensor]]
    input_axes: list[SampleAxis | None]
    output_axes: list[SampleAxis | None]
    batch: int
    samples_at_once: int
    averages: bool = False
    leaves: list[Tensor] = field(default_factory=list)
    draws: bool = False
    check: Callable[[], None] = lambda: None

    def chunks(self) -> Iterator[Chunk]:
        """Cut the batch."""
        if self.samples_at_once >= self.batch:
            yield Chunk(0, self.batch, full=True)
            return
        for start in range(0, self.batch, self.samples_at_once):
            yield Chunk(start, min(self.samples_at_once, self.batch - start), full=False)


def recomputed(recipe: Recipe, inputs: list[Tensor], held_outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute a segment of calls of which only the inputs are kept.

    Args:
        recipe: What to compute.
        inputs: The tensors from outside.
        held_outputs: For each output the memory that it goes into, if somebody holds that already.

    Returns:
        The outputs; their gradients reach ``inputs`` and the recipe's leaves.

    """
    trains = any(t.requires_grad for t in (*inputs, *recipe.leaves))
    if torch.is_grad_enabled() and trains:
        return list(apply(_Recomputed, recipe, len(inputs), len(held_outputs), *inputs, *held_outputs, *recipe.leaves))
    with torch.no_grad():
        return _averaged(recipe, _forward(recipe, inputs, held_outputs))[0]


def _forward(recipe: Recipe, inputs: list[Tensor], held_outputs: Sequence[Tensor | None]) -> list[Tensor]:
    outputs: list[Tensor | None] = [*held_outputs, None] if recipe.averages else list(held_outputs)
    for chunk in recipe.chunks():
        taken = [chunk.of(t, axis) for t, axis in zip(inputs, recipe.input_axes, strict=True)]
        made = recipe.run(taken, chunk, False)
        del taken
        for i, axis in enumerate(recipe.output_axes):
            tensor, full = made[i], outputs[i]
            if chunk.full and full is None:
                outputs[i] = _own(tensor, inputs)
            elif axis is None and not chunk.full:
                outputs[i] = tensor if full is None else full + tensor
            else:
                if full is None:
                    full = outputs[i] = _empty_full(tensor, axis, recipe.batch)
                chunk.of(full, axis).copy_(tensor)
        del made, tensor
    return [t for t in outputs if t is not None]


def _own(tensor: Tensor, inputs: list[Tensor]) -> Tensor:
    """The tensor in memory that no input shares."""
    shared = any(_storage(t) == _storage(tensor) for t in inputs)
    return tensor.clone() if shared else unviewed(tensor)


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's memory; a sparse one has none of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _averaged(recipe: Recipe, outputs: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    if not recipe.averages:
        return outputs, None
    *others, total, count = outputs
    return [*others, total / count], count


def _empty_full(of_chunk: Tensor, axis: SampleAxis | None, batch: int) -> Tensor:
    """Memory for the full batch of what a chunk is part of."""
    shape = list(of_chunk.shape)
    if axis is not None:
        shape[axis.dim] = batch * axis.per_sample
    return of_chunk.new_empty(shape)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, count: int, output_count: int, *tensors: Any) -> tuple[Tensor, ...]:
        inputs: list[Tensor] = list(tensors[:count])
        held_outputs: Sequence[Tensor | None] = tensors[count : count + output_count]
        ctx.set_materialize_grads(False)
        ctx.surroundings = _Surroundings(inputs, recipe.draws)
        outputs, ctx.divisor = _averaged(recipe, _forward(recipe, inputs, held_outputs))
        ctx.mark_dirty(*(t for t in held_outputs if t is not None))
        ctx.surroundings.seal(recipe.draws)
        ctx.recipe = recipe
        # Parameters are not saved but held as they are: the interception knows them by identity.
        ctx.parameters = {i: (t, t._version) for i, t in enumerate(inputs) if isinstance(t, nn.Parameter)}
        ctx.count, ctx.output_count = count, output_count
        ctx.save_for_backward(*(None if i in ctx.parameters else _kept(t) for i, t in enumerate(inputs)))
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        recipe.check()
        inputs = _saved_inputs(ctx)
        if ctx.divisor is not None and gradients[-1] is not None:
            gradients = (*gradients[:-1], gradients[-1] / ctx.divisor, None)
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[3 : 3 + ctx.count]) if needs]
        of_inputs: dict[int, Tensor | None] = {}
        trains = ctx.needs_input_grad[3 + ctx.count + ctx.output_count :]
        leaves = [leaf for leaf, needs in zip(recipe.leaves, trains, strict=True) if needs]
        of_leaves: list[Tensor | None] = [None] * len(leaves)
        with ctx.surroundings.restored():
            for chunk in recipe.chunks():
                found = _chunk_gradients(recipe, chunk, inputs, gradients, wanted, leaves)
                if found is None:
                    continue
                _collect(found[: len(wanted)], wanted, inputs, recipe, chunk, of_inputs)
                for i, gradient in enumerate(found[len(wanted) :]):
                    of_leaves[i] = _added(of_leaves[i], gradient)
                del found
        by_leaf = iter(of_leaves)
        return (
            *(None,) * 3,
            *(of_inputs.get(i) for i in range(ctx.count)),
            *(None,) * ctx.output_count,
            *(next(by_leaf) if needs else None for needs in trains),
        )


def _saved_inputs(ctx: Any) -> list[Tensor]:
    """The inputs of the forward pass; a parameter must be as it was then."""
    inputs: list[Tensor] = list(ctx.saved_tensors)
    for i, (parameter, version) in ctx.parameters.items():
        if parameter._version != version:
            raise RuntimeError(
                "a parameter was changed between the forward pass and its backward pass, which recomputes the "
                "forward pass: step the optimizer after backward()"
            )
        inputs[i] = parameter
    return inputs


def _chunk_gradients(
    recipe: Recipe,
    chunk: Chunk,
    inputs: list[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: list[int],
    leaves: list[Tensor],
) -> list[Tensor | None] | None:
    """Compute a chunk once more, with a graph; return the gradients of the wanted inputs and of the leaves.

    ``None`` where no output of the chunk has a gradient.
    """
    taken = [
        chunk.of(t, axis).detach() if not isinstance(t, nn.Parameter) else t
        for t, axis in zip(inputs, recipe.input_axes, strict=True)
    ]
    for i in wanted:
        taken[i] = taken[i].requires_grad_()
    token = samples_under_way.set(None if chunk.full else (chunk.start, chunk.samples))
    try:
        with torch.enable_grad():
            made = recipe.run(taken, chunk, True)
    finally:
        samples_under_way.reset(token)
    pairs = [
        (t, chunk.of(g, axis))
        for t, g, axis in zip(made, gradients, recipe.output_axes, strict=False)
        if g is not None and t.requires_grad
    ]
    del made
    if not pairs:
        return None
    sources = [*(taken[i] for i in wanted), *leaves]
    return list(torch.autograd.grad([t for t, _ in pairs], sources, [g for _, g in pairs], allow_unused=True))


def _collect(
    found: list[Tensor | None],
    wanted: list[int],
    inputs: list[Tensor],
    recipe: Recipe,
    chunk: Chunk,
    of_inputs: dict[int, Tensor | None],
) -> None:
    """Put a chunk's gradients where they belong in those of the full batch."""
    for i, gradient in zip(wanted, found, strict=True):
        if gradient is None:
            continue
        axis = recipe.input_axes[i]
        if chunk.full:
            of_inputs[i] = gradient
        elif axis is None:
            of_inputs[i] = _added(of_inputs.get(i), gradient)
        else:
            full = of_inputs.get(i)
            if full is None:
                full = gradient.new_empty(inputs[i].shape)
                of_inputs[i] = full
            chunk.of(full, axis).copy_(gradient)


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A sum over chunks; out of place, since autograd may hand out one tensor as several gradients."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient


def _kept(tensor: Tensor) -> Tensor:
    return label_saved(tensor, "anchors") if tensor.requires_grad else tensor


def _autocast_now(kind: str) -> tuple[torch.dtype, bool, bool]:
    return torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()


class _Surroundings:
    """What a computation depends on besides its inputs: random numbers, autocast, function modes."""

    def __init__(self, inputs: list[Tensor], draws: bool) -> None:
        self._simulated = any(t.is_meta for t in inputs)
        self._cuda = sorted({t.device.index or 0 for t in inputs if t.device.type == "cuda"})
        kinds = ["cpu", "cuda"] if self._cuda else ["cpu"]
        self._autocast = [(kind, *_autocast_now(kind)) for kind in kinds]
        self._simulated_autocast = simulated_autocast_dtype.get()
        self._modes = _get_current_function_mode_stack()
        self._before: list[Tensor] | None = None
        if not (self._cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._before = self._state()
        elif draws:
            raise RuntimeError(
                "a segment that is recomputed draws random numbers, and a CUDA graph cannot draw the same ones twice: "
                'prepare with recompute="none", or train without dropout'
            )

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self._cuda)]

    def seal(self, draws: bool) -> None:
        """Forget the state of the generators if no random number was drawn; on fake tensors ``draws`` says so."""
        if self._before is None:
            return
        same = all(torch.equal(a, b) for a, b in zip(self._before, self._state(), strict=True))
        if same and not (self._simulated and draws):
            self._before = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give back what the forward pass ran with."""
        with ExitStack() as stack:
            running = _get_current_function_mode_stack()
            for mode in self._modes:
                if mode not in running:  # a mode is off while it handles backward() itself
                    stack.enter_context(mode)
            stack.callback(internal_query.reset, internal_query.set(True))
            for kind, dtype, enabled, cache in self._autocast:
                if (dtype, enabled, cache) == _autocast_now(kind):
                    continue
                context: AbstractContextManager[Any] = torch.autocast(
                    kind, dtype=dtype, enabled=enabled, cache_enabled=cache
                )
                stack.enter_context(context)
            if self._simulated_autocast is not simulated_autocast_dtype.get():
                stack.enter_context(simulated_autocast(self._simulated_autocast))
            if self._before is not None:
                stack.enter_context(torch.random.fork_rng(devices=self._cuda))
                torch.set_rng_state(self._before[0])
                for device, state in zip(self._cuda, self._before[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield
