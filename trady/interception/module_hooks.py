"""The hooks by which an armed model hears that one of its modules is called, and that the call has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from trady.model.hooks import Hook


class ModuleHooks:
    """Hooks in every module of a model: a checkpointed segment is recomputed without the root.

    Of a call, only the end of the outermost module matters, except where the model decides its way by values: there the
    path comes back at the ends of modules. So the hooks that hear ends are in their place from the first time on that
    their module is the outermost; hundreds of modules inside of it are not asked.

    Args:
        model: The model.
        enter: Called before a module runs.
        leave: Called after it, also where it raises.
        refuse: Called first where ``torch.compile`` traces the model.
        all_ends: Whether the ends of all modules matter.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Callable[..., None],
        leave: Callable[..., None],
        refuse: Callable[[], None],
        *,
        all_ends: bool,
    ) -> None:
        self._handles: list[Any] = []
        #: By module, the key of the hook that hears its call, and the hook.
        self._calls: dict[int, tuple[int, Hook]] = {}
        self._left_out: list[nn.Module] = []
        #: By module, the key of the hook that hears its end, and the hook.
        self._ends: dict[int, tuple[int, Hook]] = {}
        for module in model.modules():
            before, after = Hook(enter, refuse), Hook(leave)
            begin = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            self._handles.append(begin)
            self._calls[id(module)] = begin.id, before
            end = module.register_forward_hook(after, always_call=True)
            self._handles.append(end)
            if not all_ends and module is not model:
                self._ends[id(module)] = end.id, after
                del module._forward_hooks[end.id], module._forward_hooks_always_called[end.id]

    def hear_end(self, module: nn.Module) -> None:
        """Let the end of a module be heard of: where the hook would be, had it been there since the model was armed."""
        key, after = self._ends.get(id(module), (None, None))
        hooks: Any = module._forward_hooks
        if key is not None and key not in hooks:
            later = [other for other in hooks if other > key]
            hooks[key] = after
            module._forward_hooks_always_called[key] = True
            for other in later:
                hooks.move_to_end(other)

    def leave_out(self, modules: Iterable[nn.Module]) -> None:
        """Do not hear of the calls of these modules until :meth:`put_back`; those that have other hooks are heard."""
        for module in modules:
            key, before = self._calls[id(module)]
            hooks: Any = module._forward_pre_hooks
            if len(hooks) == 1 and hooks.get(key) is before:
                self._left_out.append(module)  # before it is out: Ctrl-C may come in between
                del hooks[key]

    def put_back(self) -> None:
        """Hear of the calls of all modules again."""
        for module in self._left_out:
            key, before = self._calls[id(module)]
            hooks: Any = module._forward_pre_hooks
            hooks[key] = before
            if len(hooks) > 1:  # it comes first
                hooks.move_to_end(key, last=False)
        self._left_out.clear()

    def remove(self) -> None:
        """Take them all out."""
        self._left_out.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ends.clear()
        self._calls.clear()
