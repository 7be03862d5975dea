"""A segment of calls of which only the inputs are kept: computed in parts, and in parts again backward.

For a program ``y = f(x, w)`` that treats samples one by one, forward computes ``f`` on a few samples at a
time and keeps ``x``; backward computes ``f`` on the same samples once more, this time with a graph, and sends
their gradient through it. Never more than one part's graph is alive. Exact: no value is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from trady.ops.context import internal_query, label_saved, samples_under_way
from trady.ops.layout import unviewed
from trady.ops.sample_axis import SampleAxis


@dataclass
class Part:
    """Some samples of the batch: how many, and where they begin.

    Attributes:
        start: The first.
        samples: How many.
        whole: Whether they are the whole batch.
    """

    start: int
    samples: int
    whole: bool

    def of(self, tensor: Tensor, along: SampleAxis | None) -> Tensor:
        """These samples of a tensor."""
        if along is None or self.whole:
            return tensor
        return tensor.narrow(along.dim, self.start * along.per_sample, self.samples * along.per_sample)


@dataclass
class Recipe:
    """How a segment is computed.

    Attributes:
        run: From the tensors from outside and a part to the tensors handed on, in order. ``backward`` says
            that their values are not needed, only their graph.
        along: Where the samples lie in each tensor from outside.
        made: Where they lie in each tensor handed on; ``None`` for a sum over samples.
        batch: Samples in the batch.
        samples_at_once: Samples in a part.
        averages: Whether the last two tensors handed on are a sum and what it is to be divided by.
        leaves: Compact parameters, which receive a gradient too.
        draws: Whether random numbers are drawn.
        check: Called before anything is computed backward.
    """

    run: Callable[[list[Tensor], Part, bool], list[Tensor]]
    along: list[SampleAxis | None]
    made: list[SampleAxis | None]
    batch: int
    samples_at_once: int
    averages: bool = False
    leaves: list[Tensor] = field(default_factory=list)
    draws: bool = False
    check: Callable[[], None] = lambda: None

    def parts(self) -> Iterator[Part]:
        """Cut the batch."""
        if self.samples_at_once >= self.batch:
            yield Part(0, self.batch, whole=True)
            return
        for start in range(0, self.batch, self.samples_at_once):
            yield Part(start, min(self.samples_at_once, self.batch - start), whole=False)


def recomputed(recipe: Recipe, given: list[Tensor], shown: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute a segment of calls of which only the inputs are kept.

    Args:
        recipe: What to compute.
        given: The tensors from outside.
        shown: For each tensor handed on the memory that it goes into, if somebody holds that already.

    Returns:
        The tensors handed on; their gradients reach ``given`` and the recipe's leaves.

    """
    trains = any(t.requires_grad for t in (*given, *recipe.leaves))
    if torch.is_grad_enabled() and trains:
        return list(_Recomputed.apply(recipe, len(given), len(shown), *given, *shown, *recipe.leaves))
    with torch.no_grad():
        return _averaged(recipe, _forward(recipe, given, shown))[0]


def _forward(recipe: Recipe, given: list[Tensor], shown: Sequence[Tensor | None]) -> list[Tensor]:
    made: list[Tensor | None] = [*shown, None] if recipe.averages else list(shown)
    for part in recipe.parts():
        inputs = [part.of(t, a) for t, a in zip(given, recipe.along, strict=True)]
        out = recipe.run(inputs, part, False)
        del inputs
        for i, along in enumerate(recipe.made):
            tensor, whole = out[i], made[i]
            if part.whole and whole is None:
                made[i] = _own(tensor, given)
            elif along is None and not part.whole:
                made[i] = tensor if whole is None else whole + tensor
            else:
                if whole is None:
                    whole = made[i] = _whole(tensor, along, recipe.batch)
                part.of(whole, along).copy_(tensor)
        del out, tensor
    return [t for t in made if t is not None]


def _own(tensor: Tensor, given: list[Tensor]) -> Tensor:
    """The tensor in memory that no input shares."""
    shared = any(t.untyped_storage()._cdata == tensor.untyped_storage()._cdata for t in given)
    return tensor.clone() if shared else unviewed(tensor)


def _averaged(recipe: Recipe, made: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    if not recipe.averages:
        return made, None
    *others, total, count = made
    return [*others, total / count], count


def _whole(part: Tensor, along: SampleAxis | None, batch: int) -> Tensor:
    shape = list(part.shape)
    if along is not None:
        shape[along.dim] = batch * along.per_sample
    return part.new_empty(shape)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, count: int, handed_on: int, *tensors: Any) -> tuple[Tensor, ...]:
        given: list[Tensor] = list(tensors[:count])
        shown: Sequence[Tensor | None] = tensors[count : count + handed_on]
        ctx.set_materialize_grads(False)
        ctx.surroundings = _Surroundings(given)
        made, ctx.divisor = _averaged(recipe, _forward(recipe, given, shown))
        ctx.mark_dirty(*(t for t in shown if t is not None))
        ctx.surroundings.seal(recipe.draws)
        ctx.recipe = recipe
        # Parameters are held as they are: the interception knows them by identity.
        ctx.parameters = {i: (t, t._version) for i, t in enumerate(given) if isinstance(t, nn.Parameter)}
        ctx.count, ctx.handed_on = count, handed_on
        ctx.save_for_backward(*(None if i in ctx.parameters else _kept(t) for i, t in enumerate(given)))
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        recipe.check()
        given: list[Tensor] = list(ctx.saved_tensors)
        for i, (parameter, version) in ctx.parameters.items():
            if parameter._version != version:
                raise RuntimeError(
                    "a parameter was changed between the forward pass and its backward pass, which computes the "
                    "forward pass anew: step the optimizer after backward()"
                )
            given[i] = parameter
        if ctx.divisor is not None and gradients[-1] is not None:
            gradients = (*gradients[:-1], gradients[-1] / ctx.divisor, None)
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[3 : 3 + ctx.count]) if needs]
        outer: dict[int, Tensor | None] = {}
        trains = ctx.needs_input_grad[3 + ctx.count + ctx.handed_on :]
        leaves = [leaf for leaf, needs in zip(recipe.leaves, trains, strict=True) if needs]
        summed: list[Tensor | None] = [None] * len(leaves)
        with ctx.surroundings.restored():
            for part in recipe.parts():
                inputs = [
                    part.of(t, a).detach() if not isinstance(t, nn.Parameter) else t
                    for t, a in zip(given, recipe.along, strict=True)
                ]
                for i in wanted:
                    inputs[i] = inputs[i].requires_grad_()
                token = samples_under_way.set(None if part.whole else (part.start, part.samples))
                try:
                    with torch.enable_grad():
                        out = recipe.run(inputs, part, True)
                finally:
                    samples_under_way.reset(token)
                pairs = [
                    (t, part.of(g, along))
                    for t, g, along in zip(out, gradients, recipe.made, strict=False)
                    if g is not None and t.requires_grad
                ]
                del out
                if not pairs:
                    continue
                found: list[Tensor | None] = list(
                    torch.autograd.grad(
                        [t for t, _ in pairs],
                        [*(inputs[i] for i in wanted), *leaves],
                        [g for _, g in pairs],
                        allow_unused=True,
                    )
                )
                del pairs, inputs
                _collect(found[: len(wanted)], wanted, given, recipe, part, outer)
                for i, gradient in enumerate(found[len(wanted) :]):
                    summed[i] = _added(summed[i], gradient)
                del found
        by_leaf = iter(summed)
        return (
            *(None,) * 3,
            *(outer.get(i) for i in range(ctx.count)),
            *(None,) * ctx.handed_on,
            *(next(by_leaf) if needs else None for needs in trains),
        )


def _collect(
    found: list[Tensor | None],
    wanted: list[int],
    given: list[Tensor],
    recipe: Recipe,
    part: Part,
    outer: dict[int, Tensor | None],
) -> None:
    """Put a part's gradients where they belong in the whole ones."""
    for i, gradient in zip(wanted, found, strict=True):
        if gradient is None:
            continue
        along = recipe.along[i]
        if part.whole:
            outer[i] = gradient
        elif along is None:
            outer[i] = _added(outer.get(i), gradient)
        else:
            whole = outer.get(i)
            if whole is None:
                whole = gradient.new_empty(given[i].shape)
                outer[i] = whole
            part.of(whole, along).copy_(gradient)


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A sum over parts; out of place, since autograd may hand out one tensor as several gradients."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient


def _kept(tensor: Tensor) -> Tensor:
    return label_saved(tensor, "anchors") if tensor.requires_grad else tensor


class _Surroundings:
    """What a computation depends on besides its inputs: random numbers, autocast, function modes."""

    def __init__(self, given: list[Tensor]) -> None:
        self._simulated = any(t.is_meta for t in given)
        self._cuda = sorted({t.device.index or 0 for t in given if t.device.type == "cuda"})
        kinds = ["cpu", "cuda"] if self._cuda else ["cpu"]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in kinds
        ]
        self._modes = _get_current_function_mode_stack()
        self._before: list[Tensor] | None = self._state()

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self._cuda)]

    def seal(self, draws: bool) -> None:
        """Forget the state of the generators if no random number was drawn; without memory ``draws`` says so."""
        assert self._before is not None
        same = all(torch.equal(a, b) for a, b in zip(self._before, self._state(), strict=True))
        if same and not (self._simulated and draws):
            self._before = None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Be where the forward pass was."""
        with ExitStack() as stack:
            running = _get_current_function_mode_stack()
            for mode in self._modes:
                if mode not in running:  # a mode is off while it handles backward() itself
                    stack.enter_context(mode)
            stack.callback(internal_query.reset, internal_query.set(True))
            for kind, dtype, enabled, cache in self._autocast:
                context: AbstractContextManager[Any] = torch.autocast(
                    kind, dtype=dtype, enabled=enabled, cache_enabled=cache
                )
                stack.enter_context(context)
            if self._before is not None:
                stack.enter_context(torch.random.fork_rng(devices=self._cuda))
                torch.set_rng_state(self._before[0])
                for device, state in zip(self._cuda, self._before[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield
