"""Forward hooks: our own, which a copy of the model does not take along, and which of a model's own are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trady.errors import ModelError

#: A module's name and the code of a forward hook on it.
KnownHooks = frozenset[tuple[str, Any]]


class _ScriptedError(ModelError, AttributeError):
    """For whoever asks with a default, it is an attribute that is missing."""


class Hook:
    """A forward hook that does nothing in a copy of the model.

    Args:
        function: Called as the hook.
        refuse: Called first where ``torch.compile`` traces the model.

    """

    def __init__(self, function: Callable[..., None] | None, refuse: Callable[[], None] | None = None) -> None:
        self._function, self._refuse = function, refuse

    def __call__(self, *arguments: Any) -> None:
        """Run the hook."""
        if self._function is not None:
            if self._refuse is not None and torch.compiler.is_dynamo_compiling():
                if torch.compiler.is_exporting():  # plain PyTorch is what is to be exported
                    return
                # What is raised in traced code only ends the tracing; out here it reaches the caller.
                torch.compiler.disable(self._refuse)()
            self._function(*arguments)

    @property
    def __name__(self) -> str:
        """What ``torch.jit.script`` asks for, and nobody else: hooks are called, not compiled."""
        raise _ScriptedError(
            "torch.jit.script was called with a prepared model: call tuner.finish() first, or trace it "
            "(torch.jit.trace, torch.export)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)


class _Handles:
    """How many hooks of any kind have been made in this process, without those that are no forward hooks of a model."""

    ours = 0


def register_unwatched(register: Callable[[Any], Any], hook: Callable[..., Any]) -> None:
    """Hang in a hook that looks at no call of a module, so that nobody has to look for new hooks.

    Args:
        register: PyTorch's method that does it.
        hook: The hook.
    """
    before = RemovableHandle.next_id
    register(hook)
    _Handles.ours += RemovableHandle.next_id - before


def hooks_made() -> int:
    """A number that is another one as soon as somebody has hung in a hook anywhere."""
    return RemovableHandle.next_id - _Handles.ours


#: How modules of transformers and timm say that they run inside of a checkpoint.
_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")


def _is_switched_on(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(own.get(_SWITCHES[0]) or own.get(_SWITCHES[1]))


@dataclass(frozen=True)
class Watched:
    """Who besides its author's code looks at a model's calls.

    Attributes:
        newest: Index of the newest forward hook: they count up.
        backward: Whether a module has a backward hook.
        checkpointing: The modules whose own switch says that they run inside of a checkpoint (transformers, timm).
    """

    newest: int
    backward: bool
    checkpointing: frozenset[int]

    @classmethod
    def now(cls, model: nn.Module) -> Watched:
        """Look at every module once, in a way that is cheap enough for every forward pass."""
        newest, backward, checkpointing, waiting, seen = 0, False, [], [model], set[int]()
        while waiting:
            module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            own = module.__dict__
            waiting += [child for child in own["_modules"].values() if child is not None]
            for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
                if hooks:
                    newest = max(newest, *hooks) if len(hooks) > 1 else max(newest, next(iter(hooks)))
            backward = backward or bool(own["_backward_hooks"] or own["_backward_pre_hooks"])
            if _is_switched_on(module):
                checkpointing.append(id(module))
        return cls(newest, backward, frozenset(checkpointing))


class Watchers:
    """Tells whether all who look at the calls of a model are known.

    Args:
        model: The model, with the hooks that are known.
    """

    def __init__(self, model: nn.Module) -> None:
        now = Watched.now(model)
        self._model, self._newest, self._switched_on = model, now.newest, now.checkpointing
        self._switches = [m for m in model.modules() if any(hasattr(m, name) for name in _SWITCHES)]
        #: Hooks in this process when all were known.
        self._made: int | None = None

    def are_known(self, traced: KnownHooks) -> bool:
        """Whether all hooks that were hung in meanwhile ran in a traced pass too.

        What a checkpoint that was switched on since then recomputes must not be overwritten either.

        Args:
            traced: The forward hooks that ran in it.
        """
        if self._made == hooks_made():
            return {id(module) for module in self._switches if _is_switched_on(module)} <= self._switched_on
        self._made, now = None, Watched.now(self._model)
        if now.backward or not now.checkpointing <= self._switched_on:
            return False
        if now.newest > self._newest and forward_hooks(self._model, self._newest) <= traced:
            self._newest = now.newest
        if now.newest > self._newest:
            return False
        self._made = hooks_made()
        return True


def forward_hooks(model: nn.Module, newer_than: int = -1) -> KnownHooks:
    """Find the forward hooks of a model.

    Args:
        model: The model.
        newer_than: Leave out those with this index or a lower one: the indices of hooks count up.

    """
    return frozenset(_hooks(model, newer_than))


def _hooks(model: nn.Module, newer_than: int) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield from ((name, _code(hook)) for index, hook in hooks.items() if index > newer_than)


def _code(hook: Any) -> Any:
    """What two hooks have in common that the same line of code has made, for this call of a model and the next."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__code__", type(hook))
