"""What a training step of somebody else's loop calls: every forward pass with gradients, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from trady.errors import ModelError
from trady.model.batch import Batch, batch_of_call
from trady.model.prepared import has_weights


@dataclass(frozen=True)
class Pass:
    """One forward pass with gradients.

    Attributes:
        module: The name of the outermost module of the model that was called; empty for the model itself.
        batch: What it was called with.
    """

    module: str
    batch: Batch


@dataclass(frozen=True)
class Step:
    """What of a model a training step works on.

    Attributes:
        module: The name of the module that trains by channel; what a loss calls beside it is left to PyTorch.
        example: What its largest pass was called with.
        calls: Passes of it before a backward pass.
        has_head: Whether that module ends in the model's head: nothing else of the model is called.
    """

    module: str
    example: Batch
    calls: int = 1
    has_head: bool = True

    @classmethod
    def of(cls, model: nn.Module, passes: Sequence[Pass], *, more: Sequence[Pass] = ()) -> Step:
        """Tell it from the passes of one step.

        The model itself, where it is called. Else the one module with the most weights among those that are called:
        a loss that calls ``model.bert(…)`` and a classifier after it trains the classifier whole, as any head.

        Args:
            model: The model.
            passes: The passes of a step.
            more: Passes of a larger step, which only say how large a batch may be.

        Raises:
            ModelError: There is none: nothing of the model is called with gradients.
        """
        if not passes:
            raise ModelError(
                f"a training step calls no part of this {type(model).__name__} with gradients, as far as compute_loss "
                "shows: give one batch as its forward gets it, example={...}"
            )
        names = {each.module for each in passes}
        chosen = "" if "" in names else max(names, key=lambda name: _weights(model.get_submodule(name)))
        ours = [each.batch for each in passes if each.module == chosen]
        larger = [each.batch for each in more if each.module == chosen]
        return cls(chosen, max((*ours, *larger), key=lambda batch: batch.elements), len(ours), names == {chosen})


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class FirstPassError(Exception):
    """The first pass was called, which is all that was to be known."""


@contextmanager
def recorded(model: nn.Module, *, only_first: bool = False) -> Iterator[list[Pass]]:
    """Context in which the outermost forward passes with gradients are written down.

    They run without gradients meanwhile, so that nothing is kept for a backward pass. What runs under ``no_grad``
    (generation, evaluation, a model's reference) is no part of a step.

    Args:
        model: The model; it must not be prepared.
        only_first: Stop at the first one, with a :class:`FirstPassError`.

    Yields:
        The list that they are added to, in the order of their calls.
    """
    passes: list[Pass] = []
    names = {id(module): name for name, module in model.named_modules()}
    depth, switched_off = 0, False

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth, switched_off
        depth += 1
        if depth == 1 and torch.is_grad_enabled() and has_weights(module):
            # A model may add to the dictionaries that it gets, as those of sentence-transformers do.
            given, named = tree_map(lambda leaf: leaf, (args, kwargs))
            passes.append(Pass(names[id(module)], batch_of_call(module, given, named)))
            if only_first:
                raise FirstPassError
            switched_off = True
            torch.set_grad_enabled(False)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth, switched_off
        depth -= 1
        if depth == 0 and switched_off:
            switched_off = False
            torch.set_grad_enabled(True)

    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield passes
    except FirstPassError:
        pass
    finally:
        for handle in handles:
            handle.remove()
        if switched_off:
            torch.set_grad_enabled(True)
