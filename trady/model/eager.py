"""Models that are compiled, or that call compiled code: they run uncompiled while trady traces or trains them.

trady works on the single calls of a model, and compiled code has none. The compiled form of a module is put aside and
put back afterwards; the module stays where it is, under its name. Functions that compile themselves are told not to
while a model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trady.errors import ModelError
from trady.process.compiler import compiler_is_loaded

#: Why a prepared model does not run inside of torch.compile.
COMPILED = (
    "torch.compile was put around a prepared model, which leaves trady no single calls to work on: compile the model "
    "before trady.prepare and hand the compiled one to it (it trains uncompiled, and tuner.finish() gives the compiled "
    "model back), or compile it after tuner.finish(). A step that is compiled as a whole calls the prepared model as "
    'torch.compiler.disable(model); torch.compiler.set_stance("force_eager") keeps all compilers off meanwhile'
)

#: What happens to a compiled model.
UNCOMPILED = (
    "the model is compiled: it runs uncompiled as long as it is prepared, since trady works on its single calls, and "
    "compiled again after tuner.finish()"
)


#: Why a prepared model does not train inside of a transform of torch.func.
TRANSFORMED = (
    "torch.func's vmap, grad and the like were put around a prepared model, whose channels they do not reach: call it "
    "under torch.no_grad(), inside `with tuner.untouched():`, or after tuner.finish()"
)


def is_written_down() -> bool:
    """Whether PyTorch writes a model down instead of running it: ``torch.jit.trace``, ``torch.export``, ONNX.

    A prepared model is plain PyTorch then: its weights hold what was trained.

    Raises:
        ModelError: A transform of ``torch.func`` is at work that wants gradients.
    """
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    if torch.is_grad_enabled():
        raise ModelError(TRANSFORMED)
    return True


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` returns."""
    return compiler_is_loaded() and isinstance(module, torch._dynamo.OptimizedModule)


def _plain_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module.forward`` was before it was compiled; ``None`` if it is not."""
    if _is_wrapper(module):
        return module._orig_mod.__call__  # type: ignore[operator]
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__dict__", {})
    return own.get("_torchdynamo_orig_callable") if own.get("_torchdynamo_wrapper_id") == id(forward) else None


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a module in it, has a compiled form."""
    return any(m._compiled_call_impl is not None or _plain_forward(m) is not None for m in model.modules())


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the module that was given to ``torch.compile``; any other module as it is."""
    while _is_wrapper(model):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def uncompiled_name(name: str) -> str:
    """Return the name that a tensor or module has in the model that was not compiled yet."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


class Uncompiled:
    """Modules of a model without their compiled forms, until :meth:`put_back`.

    Args:
        model: The model; none of its names, keys and classes changes.

    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._calls = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
        self._forwards: list[tuple[nn.Module, Any]] = []
        for module, _ in self._calls:
            module._compiled_call_impl = None
        for module in modules:
            if (plain := _plain_forward(module)) is not None:
                self._forwards.append((module, module.forward))
                module.forward = plain

    def put_back(self) -> None:
        """Let the modules run compiled again; what was compiled again meanwhile stays."""
        for module, call in self._calls:
            if module._compiled_call_impl is None:
                module._compiled_call_impl = call
        for module, forward in self._forwards:
            module.forward = forward
        self._calls, self._forwards = [], []


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Context in which a model, and all that it calls, runs uncompiled."""
    aside, compilers = Uncompiled(model), CompilersOff()
    try:
        compilers.begin()
        yield
    finally:
        compilers.end()
        aside.put_back()


class CompilersOff:
    """Keeps code from being compiled, or run compiled, from :meth:`begin` to :meth:`end`."""

    def __init__(self) -> None:
        self._end: Callable[[], Any] | None = None

    def begin(self) -> None:
        """Run all code as it is written from here on.

        Raises:
            ModelError: A compiler is at work on the code that calls this.

        """
        if self._end is not None or not compiler_is_loaded():
            return
        try:
            stance = torch.compiler.set_stance("force_eager")
        except RuntimeError as error:
            raise ModelError(COMPILED) from error
        self._end = lambda: stance.__exit__(None, None, None)

    def end(self) -> None:
        """Go back to how it was."""
        if self._end is not None:
            end, self._end = self._end, None
            end()


def uncompiled_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` of a model without its compiled forms; compilers are not copied."""
    memo |= {id(m.dynamo_ctx): m.dynamo_ctx for m in model.modules() if _is_wrapper(m)}
    with uncompiled(model):
        copied: nn.Module = copy.deepcopy(model, memo)
    Uncompiled(copied)
    return copied
