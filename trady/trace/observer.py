"""One forward pass on the real example, for a model that looks at values: what it sees there."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from trady.calls.canonical import untransposed
from trady.calls.mode import CallMode
from trady.calls.questions import draws_numbers
from trady.calls.recognize import run_on_meta
from trady.model.batch import tensors_among, without_memory
from trady.model.parameters import own_parameters
from trady.trace.answers import Answer, Outline
from trady.trace.batch_counters import READS_ONE, batch_counters, batches_counted, is_count

_META = torch.device("meta")


class Observer(CallMode):
    """Computes every call, without a graph, and notes those that fake tensors cannot do.

    Args:
        model: The model; it is inside of :func:`trady.model.untouched.untouched`.

    Attributes:
        answers: To the calls that need values of activations, in order.

    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self._own = {id(t): t for t in [*own_parameters(model), *model.buffers()]}
        self._counters = batch_counters(model)
        self._activations: dict[int, weakref.ref[Tensor]] = {}
        self._plain: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._twins: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def input(self, tensor: Tensor) -> Tensor:
        """Take a tensor of the batch: a trace knows the values of ids and masks, and of no others."""
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
            return tensor
        tensor = tensor.detach()
        self._activations[id(tensor)] = weakref.ref(tensor)
        return tensor

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call."""
        tensors = list(tensors_among((*args, *kwargs.values())))
        if is_count(func, args, self._counters):
            return args[0]
        if not tensors:
            return func(*args, **kwargs)
        if func in READS_ONE and id(tensors[0]) in self._counters:
            return batches_counted(func, tensors[0])
        if not any(self._unknown(untransposed(tensor)) for tensor in tensors):
            return func(*args, **kwargs)
        on_meta = self._on_meta(func, args, kwargs)
        plain_args, plain_kwargs = tree_map(self._detached, (args, kwargs))
        with torch.random.fork_rng(devices=(), enabled=draws_numbers(func, args, kwargs)):
            out = func(*plain_args, **plain_kwargs)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._activations[id(leaf)] = weakref.ref(leaf)
        if on_meta is None or _differ(_outlines(out), on_meta):
            self.answers.append(Answer.of(func, (*args, *kwargs.values()), out))
        return out

    def _unknown(self, tensor: Tensor) -> bool:
        """Whether a trace does not know a tensor's values."""
        known = self._activations.get(id(tensor))
        return (known is not None and known() is tensor) or id(tensor) in self._own or tensor.is_meta

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What fake tensors give; ``None`` where they cannot."""
        fake_args, fake_kwargs = tree_map(self._fake, (args, kwargs))
        try:
            return _outlines(run_on_meta(func, fake_args, fake_kwargs))
        except Exception:
            return None

    def _detached(self, value: Any) -> Any:
        """A tensor without gradient: no graph is made."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        known = self._plain.get(id(value))
        if known is None or known[0]() is not value:
            known = self._plain[id(value)] = (weakref.ref(value), value.detach())
        return known[1]

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return _META
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        known = self._twins.get(id(value))
        if known is None or known[0]() is not value:
            known = self._twins[id(value)] = (weakref.ref(value), without_memory(value))
        return known[1]


def _outlines(result: Any) -> list[Any]:
    return [Outline.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree_iter(result)]


def _differ(real: list[Any], fake: list[Any]) -> bool:
    """Whether a pass that goes on with what fake tensors have given would see something else."""
    told = (Outline, bool, int, float, str)
    return len(real) != len(fake) or any(
        type(a) is not type(b) or (isinstance(a, told) and a != b) for a, b in zip(real, fake, strict=True)
    )
