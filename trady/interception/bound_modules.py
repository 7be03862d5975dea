"""Modules of PyTorch that make one call: their place in the plan is asked in their own forward, not by a function mode.

What a mode hears has been through PyTorch's dispatch to Python first, and every module tells its hooks that it is
called. While a pass of the whole model follows a plan, a module whose forward is one call known beforehand, such as
:class:`torch.nn.Linear`, has another ``forward``: it makes the arguments that PyTorch's own would make, asks the place
that comes next, and computes what that says. Whatever differs goes PyTorch's way.

Both ``forward`` and the missing hook are there during a pass only. One that was interrupted leaves them behind; they
are put back at the next call of any module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trady.interception.forward_state import ForwardState
from trady.interception.module_hooks import ModuleHooks
from trady.interception.places import Place

_modes = torch._C._len_torch_function_stack
_WithoutModes = torch._C.DisableTorchFunction

#: Arguments behind the input, as PyTorch's own forward would hand them on; ``None`` where it does more than one call.
_Arguments = Callable[[nn.Module], tuple[Any, ...] | None]


def _linear(module: Any) -> tuple[Any, ...]:
    own = module._parameters
    return own["weight"], own["bias"]


def _convolution(module: Any) -> tuple[Any, ...] | None:
    own = module._parameters
    if module.padding_mode != "zeros":
        return None
    return own["weight"], own["bias"], module.stride, module.padding, module.dilation, module.groups


def _affine(module: Any) -> tuple[Any, ...]:
    own = module._parameters
    return tuple(value for value in (own["weight"], own["bias"]) if value is not None)


def _nothing(module: Any) -> tuple[Any, ...]:
    return ()


#: By class, the function that its forward calls, its arguments, and whether they are all that it is called with. Of the
#: others only the parameters are read: they are for places that hand a value on, or that PyTorch computes itself.
_CALLS: dict[type[nn.Module], tuple[Any, _Arguments, bool]] = {
    nn.Linear: (F.linear, _linear, True),
    nn.Conv1d: (torch.conv1d, _convolution, True),
    nn.Conv2d: (torch.conv2d, _convolution, True),
    nn.Conv3d: (torch.conv3d, _convolution, True),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (F.batch_norm, _affine, False)),
    nn.LayerNorm: (F.layer_norm, _affine, False),
    nn.ReLU: (F.relu, _nothing, False),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), (F.hardtanh, _nothing, False)),
    nn.LeakyReLU: (F.leaky_relu, _nothing, False),
    nn.GELU: (F.gelu, _nothing, False),
    nn.SiLU: (F.silu, _nothing, False),
}

#: The forward of each, as PyTorch has it: one that somebody has changed is not known.
_FORWARDS = {kind: kind.forward for kind in _CALLS}


class BoundModules:
    """The modules of a model that make one call each.

    Args:
        model: The model.
        hooks: Its hooks, of which those of these modules are left out meanwhile.
        now: Returns the forward pass that runs.
        recover: Puts everything back after a pass that was interrupted.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: ModuleHooks,
        now: Callable[[], ForwardState | None],
        recover: Callable[[], None],
    ) -> None:
        self._hooks = hooks
        self._bound = [
            _BoundForward(module, *_CALLS[type(module)], now, recover)
            for module in model.modules()
            if type(module) in _CALLS and module is not model
        ]
        self._there: list[_BoundForward] = []

    def begin(self) -> None:
        """Answer for the modules from now on."""
        for bound in self._bound:
            module = bound.module
            if "forward" not in module.__dict__ and type(module).forward is _FORWARDS.get(type(module)):
                self._there.append(bound)  # before it is there: Ctrl-C may come in between
                module.__dict__["forward"] = bound
        self._hooks.leave_out(bound.module for bound in self._there)

    def end(self) -> None:
        """Give the modules their own forward back."""
        if self._there:
            for bound in self._there:
                if bound.module.__dict__.get("forward") is bound:
                    del bound.module.__dict__["forward"]
            self._there.clear()
            self._hooks.put_back()


class _BoundForward:
    """The forward of one module while a pass follows the plan."""

    __slots__ = ("_arguments", "_function", "_now", "_own", "_recover", "_whole", "module")

    def __init__(
        self,
        module: nn.Module,
        function: Any,
        arguments: _Arguments,
        whole: bool,
        now: Callable[[], ForwardState | None],
        recover: Callable[[], None],
    ) -> None:
        self.module, self._function, self._arguments, self._whole = module, function, arguments, whole
        self._now, self._recover = now, recover
        self._own = MethodType(_FORWARDS[type(module)], module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module as the place says that comes next, or as PyTorch does."""
        forward = self._now()
        if forward is None or forward.abandoned:  # Ctrl-C has left this behind
            self._recover()
            return self.module(*args, **kwargs)
        places = forward.places
        if places is None or forward.writing is not None or kwargs or len(args) != 1 or _modes() != 1:
            return self._own(*args, **kwargs)
        place = places[forward.cursor]
        if place is None or place.function is not self._function or type(args[0]) is not Tensor:
            return self._own(*args)
        out = self._computed(forward, place, args[0])
        return self._own(*args) if out is NotImplemented else out

    def _computed(self, forward: ForwardState, place: Place, x: Tensor) -> Any:
        rest = self._arguments(self.module)
        if rest is None or not forward.is_in_section:
            return NotImplemented
        args = (x, *rest)
        if not (self._whole and place.is_bound):
            known = place.goes_by_parameters if place.compute is None else place.hands_on
            if not known or not place.fits(args, {}):
                return NotImplemented
        with _WithoutModes():
            if place.compute is not None:
                return forward.as_before(place, args, {})
            forward.cursor += 1
            return self._own(x)

    def __reduce__(self) -> Any:
        """A copy of a model that was interrupted has the forward of its class."""
        return getattr, (self.module, "forward")  # which has no attributes of its own yet
