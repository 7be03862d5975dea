"""Optimizers as people write them: over the model's parameters, wrapped, made before the model was prepared."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trady.errors import StateError, TradyError, TradyWarning
from trady.interception.armed import Armed, Change
from trady.model.parameters import own_parameters
from trady.tuner.followed import look_at
from trady.tuner.optimizer_state import remap_state

#: Attributes by which a wrapper holds the optimizer that it wraps.
_WRAPPED = ("optimizer", "base_optimizer")

#: Where the state of an optimizer says which channels it is of.
_SIGNATURE = "trady_channels"


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that takes the steps, from inside of wrappers such as Accelerate's."""
    return _layers(optimizer)[-1]


def _layers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return a wrapper, what it wraps, and so on, to the optimizer that takes the steps."""
    layers = [optimizer]
    while True:
        found = (layers[-1].__dict__.get(name) for name in _WRAPPED)
        inner = next((o for o in found if isinstance(o, torch.optim.Optimizer) and o is not layers[-1]), None)
        if inner is None:
            return layers
        layers.append(inner)


def _with_own_state(given: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the wrappers of an optimizer that keep something by parameter themselves.

    Raises:
        StateError: One has copies of whole weights already.
    """
    *around, inner = _layers(given)
    kept = [each for each in around if isinstance(getattr(each, "state", None), dict) and each.state is not inner.state]
    if full := next((each for each in kept if each.state), None):
        name = type(full).__name__
        raise StateError(
            f"{name} has copies of whole weights already, which cannot become those of channels: attach the "
            f"{type(inner).__name__} inside it, or take an optimizer that keeps them itself (docs/optimizers.md)"
        )
    return kept


def adopt(
    optimizer: torch.optim.Optimizer,
    compact_of: Mapping[nn.Parameter, nn.Parameter],
    trained: Iterable[nn.Parameter],
    model: Iterable[nn.Parameter],
) -> None:
    """Let an optimizer over the model's parameters update what trains in their place.

    A weight gives its place to its compact parameter: in the same group, with the same options. Parameters of the model
    that are frozen are dropped. The groups stay, also empty ones, so that schedulers find them. State of weights that
    an optimizer has kept before is dropped with them.

    Args:
        optimizer: Changed in place.
        compact_of: A layer's weight to its compact parameter.
        trained: Everything that trains: compact parameters and the head.
        model: All parameters of the model.
    """
    keep = {id(p) for p in trained}
    frozen = {id(p) for p in model} - keep
    by_weight = {id(weight): compact for weight, compact in compact_of.items()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        params: list[nn.Parameter] = []
        for parameter in group["params"]:
            compact = by_weight.get(id(parameter))
            if compact is not None and id(parameter) not in keep:
                if id(compact) not in held:
                    held.add(id(compact))
                    params.append(compact)
            elif id(parameter) not in frozen:
                params.append(parameter)
                continue
            optimizer.state.pop(parameter, None)
        group["params"][:] = params  # in place: wrappers share the list


def check_nobody_waits(layers: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse a step while channels have a gradient that no attached optimizer will use.

    Raises:
        StateError: The message names the layers.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    waiting = [name for name, compact in layers.items() if compact.grad is not None and id(compact) not in held]
    if waiting:
        shown = ", ".join(waiting[:4]) + (f" and {len(waiting) - 4} more" if len(waiting) > 4 else "")
        raise StateError(
            f"no optimizer that is attached updates the channels of {shown}: build it from tuner.parameters(), or from "
            "the prepared model's parameters, and call tuner.attach(optimizer)"
        )


class StrangerCheck:
    """Refuses the first step of an optimizer over a tuner's channels that the tuner was never told of.

    Its steps would be made, but momentum would not follow the channels from draw to draw.

    Args:
        updated: The compact parameters, and the weights that they train in the place of.
        attached: The optimizers that the tuner knows.
    """

    def __init__(
        self, updated: Iterable[nn.Parameter], attached: Callable[[], Sequence[torch.optim.Optimizer]]
    ) -> None:
        self._updated = {id(p) for p in updated}
        self._attached = attached
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        check = weakref.WeakMethod(self._check)
        self._handle = register_optimizer_step_pre_hook(lambda optimizer, *_: (call := check()) and call(optimizer))
        weakref.finalize(self, self._handle.remove)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in self._seen:
            return
        if innermost(optimizer) not in self._attached() and any(
            id(p) in self._updated for group in optimizer.param_groups for p in group["params"]
        ):
            raise StateError(
                f"this {type(optimizer).__name__} updates channels and was never attached: call "
                "optimizer = tuner.attach(optimizer) before its first step"
            )
        self._seen.add(optimizer)

    def remove(self) -> None:
        """Look at no further step."""
        self._handle.remove()


class Optimizers:
    """The optimizers that a tuner follows, and what people's code sees of what they update.

    Args:
        armed: The armed model.
        head: Parameters of the head.
    """

    def __init__(self, armed: Armed, head: Iterable[nn.Parameter]) -> None:
        self._armed = armed
        self._compact = {layer.name: layer.compact for layer in armed.layers.values()}
        self._head = list(head)
        self._trained = [*self._compact.values(), *self._head]
        self._known: list[weakref.ref[torch.optim.Optimizer]] = []
        #: Wrappers that keep something by parameter themselves, as Lookahead does.
        self._around: list[weakref.ref[torch.optim.Optimizer]] = []
        #: Optimizers whose state was loaded since their last step: it may be of channels that the tuner is to load yet.
        #: What channels it is of, where it says so.
        self._loaded: weakref.WeakKeyDictionary[torch.optim.Optimizer, str | None] = weakref.WeakKeyDictionary()
        self._digest = armed.selection.digest
        armed.shown.begin()
        armed.frozen.begin()
        weights = [layer.weight for layer in armed.layers.values()]
        self._weights = set(map(id, weights))
        self._strangers = StrangerCheck([*self._compact.values(), *weights], self)
        #: Whether a gradient has reached a channel since the first forward pass after a step, and whether one was run.
        self._arrived = self._ran = False
        self._stepped, self._warned = True, False
        self._ended = False
        #: Called before every step of one of them that computes no gradients itself, and when the tuner has finished.
        self.before: list[Callable[[], None]] = []
        self.at_end: list[Callable[[], None]] = []
        armed.on_forward.append(self._before_forward)
        armed.on_gradient.append(self._gradient_arrived)

    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[torch.optim.Optimizer], None],
        after: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        """Be called before and after the steps of an optimizer, for as long as it has channels after the end."""
        ours = {id(p) for p in self._compact.values()}

        def given_back(stepped: torch.optim.Optimizer) -> bool:
            return self._ended and not any(id(p) in ours for group in stepped.param_groups for p in group["params"])

        def about_to(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if not given_back(stepped):
                # A closure brings the gradients of its own backward pass to those that wait.
                if not any(given is not None for given in (*args[1:], *kwargs.values())):
                    for call in self.before:
                        call()
                before(stepped)

        # They know no optimizer: it has them, and a cycle would keep it.
        optimizer.register_step_pre_hook(about_to)
        optimizer.register_step_post_hook(lambda stepped, *_: None if given_back(stepped) else after(stepped))

    def __call__(self) -> list[torch.optim.Optimizer]:
        """Return those that are still there, in the order in which they were attached."""
        return [optimizer for reference in self._known if (optimizer := reference()) is not None]

    def _wrappers(self) -> list[torch.optim.Optimizer]:
        return [wrapper for reference in self._around if (wrapper := reference()) is not None]

    @contextmanager
    def adopting(self, optimizer: torch.optim.Optimizer, given: torch.optim.Optimizer) -> Iterator[None]:
        """Take an optimizer over, from inside of what was given; if what follows refuses it, it is as it was.

        Raises:
            StateError: It has nothing that trains, or its state cannot follow channels.
        """
        groups, state = [list(group["params"]) for group in optimizer.param_groups], dict(optimizer.state)
        try:
            self._adopt(optimizer)
            trained = {id(p) for p in self._trained}
            if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
                raise StateError("the optimizer has none of the tuner's parameters: build it from tuner.parameters()")
            look_at(optimizer, list(self._compact.values()))
            around = _with_own_state(given)
            yield
        except TradyError:
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"][:] = parameters
            optimizer.state.update(state)
            raise
        if all(known is not optimizer for known in self()):
            self._known.append(weakref.ref(optimizer))
            self._around += map(weakref.ref, around)
            self._sign_state(optimizer)

    def _sign_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the state of an optimizer say which channels it is of: momentum of others has the same shape."""
        us = weakref.ref(self)

        def sign(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            if (ours := us()) is not None and not ours._ended:
                state[_SIGNATURE] = ours._armed.selection.digest

        def read(loading: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            if (ours := us()) is not None and not ours._ended:
                ours._loaded[loading] = state.pop(_SIGNATURE, None)

        optimizer.register_state_dict_post_hook(sign)
        optimizer.register_load_state_dict_pre_hook(read)

    def _check_loaded(self) -> None:
        """Refuse state of other channels than those that trained until now; it is looked at once.

        Raises:
            StateError: The tuner's state was not loaded beside the optimizer's.
        """
        of, self._loaded = list(self._loaded.values()), weakref.WeakKeyDictionary()
        if any(digest is not None and digest != self._digest for digest in of):
            raise StateError(
                "the state that was loaded into the optimizer is of other channels than those that train now: load the "
                "tuner's state too, tuner.load_state_dict(...); Accelerate does it in load_state after "
                "accelerator.register_for_checkpointing(tuner)"
            )

    def _adopt(self, optimizer: torch.optim.Optimizer) -> None:
        compact_of = {layer.weight: layer.compact for layer in self._armed.layers.values()}
        adopt(optimizer, compact_of, self._trained, own_parameters(self._armed.model))

    def drawn(self, changes: Sequence[Change]) -> None:
        """Let the state follow the channels."""
        self._check_loaded()
        self._digest = self._armed.selection.digest
        for optimizer in [*self(), *self._wrappers()]:
            for change in changes:
                remap_state(optimizer, change)

    def restored(self, changes: Sequence[Change]) -> None:
        """Let the state follow channels that a checkpoint has chosen, but where it was loaded from there before."""
        self._digest = self._armed.selection.digest
        for optimizer in [*self(), *self._wrappers()]:
            for change in () if optimizer in self._loaded else changes:
                remap_state(optimizer, change)

    def before_step(self) -> None:
        """Refuse a step while channels have a gradient that nobody will use; start from a checkpoint just loaded."""
        self._check_loaded()
        self._armed.shown.check_not_asked()
        for optimizer in self():
            if any(id(p) in self._weights for group in optimizer.param_groups for p in group["params"]):
                self._adopt(optimizer)  # add_param_group() since it was attached
        self._look_for_gradients()
        check_nobody_waits(self._compact, self())
        self._armed.write_back()
        self._armed.follow()

    def _gradient_arrived(self, *_: object) -> None:
        self._arrived = True

    def _look_for_gradients(self) -> None:
        """Say once that the head has a gradient, and no channel: it may be asked for by the names of the weights."""
        trains = [p for p in self._compact.values() if len(p) and p.requires_grad]
        lacking = self._ran and not self._arrived and trains and all(p.grad is None for p in trains)
        lacking = lacking and torch._C._current_graph_task_id() == -1  # in a backward pass, channels may follow
        if lacking and not self._warned and any(p.grad is not None for p in self._head):
            self._warned = True
            warnings.warn(
                "the head has a gradient, and none has reached a channel since the last step: where the loss goes "
                "through the model, ask torch.autograd.grad for tuner.parameters(), which the forward pass reads in "
                "the place of weights",
                TradyWarning,
                stacklevel=4,
            )

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look for gradients again from the next forward pass on."""
        self._stepped = True

    def _before_forward(self, *_: object) -> None:
        if torch.is_grad_enabled():
            self._armed.follow()
            self._ran = True
            if self._stepped:
                self._arrived = self._stepped = False

    def end(self) -> None:
        """Let go of the model and of the optimizers."""
        self._ended = True
        for call in self.at_end:
            call()
        self._strangers.remove()
