"""Modules that are not imported until something of them is needed that cannot be answered without them.

A :class:`PostponedModule` stands in ``sys.modules`` where a heavy module will. It answers the few questions that have
an obvious answer. Anything else brings the real module, which then takes its place back: another attribute, a
submodule, a question that is not obvious. Nothing of another package is changed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

#: What an answer returns when only the real module can tell.
ASK: Any = object()

_swapping = threading.Lock()


class _NoInstances:
    """What nothing is an instance of."""


class PostponedModule(ModuleType):
    """Stands where a module will.

    Args:
        spec: Of the module that is waited for.
        answers: Functions of that module by name; each returns what the real one would, or :data:`ASK`.
        classes: Classes of that module by name, and the modules that ask for instances of them and for nothing else.
            There are none as long as the module is not imported.
        gone: Called when the real module is about to be imported.
    """

    def __init__(
        self,
        spec: importlib.machinery.ModuleSpec,
        answers: Mapping[str, Callable[..., Any]],
        classes: Mapping[str, Collection[str]],
        gone: Callable[[], None],
    ) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__package__ = spec, spec.parent
        if spec.submodule_search_locations is not None:
            self.__path__ = list(spec.submodule_search_locations)
        self._answers, self._classes, self._gone = answers, classes, gone

    @property
    def _stands(self) -> bool:
        return sys.modules.get(self.__name__) is self

    def _real(self) -> ModuleType:
        with _swapping:
            if self._stands:
                del sys.modules[self.__name__]
                parent, _, child = self.__name__.rpartition(".")
                if parent:
                    sys.modules[parent].__dict__.pop(child, None)
                self._gone()
        return importlib.import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what introspection looks for, not a use
            raise AttributeError(name)
        if self._stands and sys._getframe(1).f_globals.get("__name__") in self._classes.get(name, ()):
            return _NoInstances
        answer = self._answers.get(name)
        if answer is None or not self._stands:
            return getattr(self._real(), name)

        @wraps(answer)
        def ask(*args: Any, **kwargs: Any) -> Any:
            found = answer(*args, **kwargs) if self._stands else ASK
            return getattr(self._real(), name)(*args, **kwargs) if found is ASK else found

        self.__dict__[name] = ask
        return ask


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Brings a real package before any of its submodules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = sys.modules.get(fullname.rpartition(".")[0])
        if not isinstance(package, PostponedModule):
            return None
        package._real()
        # A package imports most of its submodules itself: those must not be executed a second time.
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in sys.modules else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def postpone(
    name: str,
    answers: Mapping[str, Callable[..., Any]],
    classes: Mapping[str, Collection[str]] | None = None,
    gone: Callable[[], None] = lambda: None,
) -> PostponedModule | None:
    """Let a module wait until it is needed.

    Args:
        name: Of the module; its package is imported.
        answers: See :class:`PostponedModule`.
        classes: See there.
        gone: Called when the real module is about to be imported.

    Returns:
        What stands in its place; ``None`` where the module is there already, or there is no such module.
    """
    present = sys.modules.get(name)
    if present is not None:
        return present if isinstance(present, PostponedModule) else None
    parent, _, child = name.rpartition(".")
    package = importlib.import_module(parent) if parent else None
    spec = importlib.util.find_spec(name)
    if spec is None or name in sys.modules:
        return None
    if not any(isinstance(finder, _Submodules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Submodules())
    sys.modules[name] = module = PostponedModule(spec, answers, classes or {}, gone)
    if package is not None:
        setattr(package, child, module)
    return module
