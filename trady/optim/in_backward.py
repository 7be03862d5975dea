r"""Optimizers that update a layer inside the backward pass, as soon as its compact gradient exists, and free it.

An update needs nothing but its own gradient, so the gradients of all layers need not exist at the same time:

    for each layer, in the order of the backward pass:   (W_c, s) <- update(W_c, s, dL/dW_c),   free dL/dW_c

(LOMO, Lv et al. 2023, arXiv 2306.09782; AdaLomo, Lv et al. 2023, arXiv 2310.10195, with second moments.) That is safe:
the backward pass reads the frozen ``weight``, into which compact parameters are written only before the next forward
pass. The head has no such second copy. It waits for ``step()``, when all of its gradients exist, so that it can be
clipped by their common norm.

The arithmetic is that of ``torch.optim``, called with one parameter, and so are state and ``state_dict``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trady.errors import StateError, TrainingError
from trady.optim.clipping import clip_channels_

#: Share of the past in the running norm: about ten steps.
_NORM_DECAY = 0.9


class UpdatesInBackward(torch.optim.Optimizer):
    """What :class:`SGD` and :class:`AdamW` have in common; a tuner that it is attached to brings the gradients.

    Attributes:
        outer: The optimizer of ``torch.optim`` with the same arithmetic.
    """

    outer: ClassVar[type[torch.optim.Optimizer]]

    @property
    def update_forms(self) -> int:
        """Number of temporary tensors of a gradient's size that an update needs, beside the gradient and the state."""
        raise NotImplementedError

    _compact: set[int] | None = None

    def _begin(self, channel_clip: float | None, max_norm: float | None) -> None:
        for name, limit in (("channel_clip", channel_clip), ("max_norm", max_norm)):
            if limit is not None and not limit > 0:
                raise TrainingError(f"{name} is {limit}; give more than zero, or None")
        self.defaults.update(channel_clip=channel_clip, max_norm=max_norm, running_norm=0.0)
        self._complete()

    def _complete(self) -> None:
        for group in self.param_groups:
            for name in ("channel_clip", "max_norm", "running_norm"):
                group.setdefault(name, self.defaults[name])
        self._updated: set[int] = set()
        self._norms: list[float] = []
        self._squares = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._complete()

    def take(self, compact: Iterable[nn.Parameter]) -> None:
        """Update these parameters when their gradient arrives, and all others in ``step()``.

        Args:
            compact: Parameters that the backward pass does not read; parameters of other optimizers are ignored.
        """
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        self._compact = (self._compact or set()) | {id(p) for p in compact if id(p) in mine}

    @property
    def gradient_norms(self) -> tuple[float, ...]:
        """Norm before clipping of every gradient that has been applied since the last ``step()``."""
        return tuple(self._norms)

    def clips_channels(self, ratio: float | str) -> bool:
        """Whether this optimizer clips the gradients of all channels that it updates with a ratio; a word is any."""
        compact = self._compact or ()
        groups = [group for group in self.param_groups if any(id(p) in compact for p in group["params"])]
        clips = [group["channel_clip"] for group in groups]
        return all(clip is not None if isinstance(ratio, str) else clip == ratio for clip in clips)

    @torch.no_grad()
    def gradient_arrived(self, parameter: nn.Parameter) -> None:
        """Update a parameter of :meth:`take` and free its gradient; ignore any other parameter.

        Raises:
            StateError: It is the second gradient since the last ``step()``.
        """
        if id(parameter) not in (self._compact or ()):
            return
        if id(parameter) in self._updated:
            parameter.grad = None
            raise StateError(
                "a second gradient of a layer arrived before optimizer.step(), and the first has been applied: one "
                f"backward pass a step. To add up the gradients of several, use torch.optim.{self.outer.__name__}; "
                "also where a layer is shared between segments of checkpoint(use_reentrant=True)"
            )
        self._updated.add(id(parameter))
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        if self._measure(group, parameter):
            self._scale(group, parameter, max(math.sqrt(self._squares), group["running_norm"]))
            self._update(group, [parameter])
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the step: update the parameters that still have their gradient (the head), and run the hooks.

        Args:
            closure: Computes the loss and its gradients; called first.

        Returns:
            What ``closure`` returned.

        Raises:
            StateError: The optimizer is attached to no tuner.
        """
        if self._compact is None:
            name = self.outer.__name__
            raise StateError(
                f"this {name} updates inside the backward pass of an armed model and is attached to none: type "
                f"optimizer = tuner.attach(trady.optim.{name}(tuner.parameters(), ...)) before the first "
                f"backward(); for plain parameters use torch.optim.{name}"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waiting = [
            (group, [p for p in group["params"] if p.grad is not None and self._measure(group, p)])
            for group in self.param_groups
        ]
        norm = math.sqrt(self._squares)
        for group, parameters in waiting:
            for parameter in parameters:
                self._scale(group, parameter, norm)
            if parameters:
                self._update(group, parameters)
            if group["max_norm"] is not None and norm > 0:
                before = group["running_norm"]
                group["running_norm"] = _NORM_DECAY * before + (1 - _NORM_DECAY) * norm if before else norm
        self._updated.clear()
        self._norms.clear()
        self._squares = 0.0
        return loss

    def _measure(self, group: dict[str, Any], parameter: nn.Parameter) -> bool:
        """Clip the channels of a gradient and note its norm; drop a gradient that is not finite."""
        norm = _norm(parameter)
        self._norms.append(norm)
        if not math.isfinite(norm):
            parameter.grad = None
            return False
        if group["channel_clip"] is not None and id(parameter) in (self._compact or ()):
            clip_channels_([parameter], group["channel_clip"])
            norm = _norm(parameter) if group["max_norm"] is not None else norm
        self._squares += norm * norm
        return True

    def _scale(self, group: dict[str, Any], parameter: Tensor, norm: float) -> None:
        limit = group["max_norm"]
        if limit is not None and norm > limit and parameter.grad is not None:
            parameter.grad.mul_(limit / (norm + 1e-6))

    def _update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """Run torch.optim's own step over a few parameters of one group."""
        step: Any = self.outer.step
        # torch.optim wraps the step of a class in hooks when its first optimizer is made. Here they belong to the
        # step of this class, and would run twice.
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        groups, self.param_groups = self.param_groups, [{**group, "params": parameters}]
        try:
            step(self)
        finally:
            self.param_groups = groups

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step alone reads this, so it is the one place to detect a scaler.
        raise StateError(
            "torch.amp.GradScaler cannot be used with updates inside the backward pass, which come before it "
            "could unscale the gradient. The channels have been updated with the scaled gradient: load a checkpoint, "
            f"and train with bfloat16 (which needs no scaler) or torch.optim.{self.outer.__name__}"
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch.optim sets for ``fused``: it concerns its own step only."""


def _norm(parameter: Tensor) -> float:
    gradient = parameter.grad
    assert gradient is not None
    # Half precision would overflow in the sum of squares.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return float(torch.linalg.vector_norm(gradient, dtype=dtype))


def update_forms(optimizers: Iterable[torch.optim.Optimizer], compact: Iterable[nn.Parameter]) -> int | None:
    """Number of temporary tensors of a gradient's size for these updates; ``None`` if a parameter waits for a step."""
    inside = [optimizer for optimizer in optimizers if isinstance(optimizer, UpdatesInBackward)]
    theirs = {id(p) for optimizer in inside for group in optimizer.param_groups for p in group["params"]}
    if not inside or not all(id(parameter) in theirs for parameter in compact):
        return None
    return max(optimizer.update_forms for optimizer in inside)


class SGD(UpdatesInBackward, torch.optim.SGD):
    """``torch.optim.SGD``, bit for bit, inside the backward pass.

    Args:
        params: ``tuner.parameters()``, or parameter groups of them.
        lr: Learning rate; read when a gradient arrives, so set it before ``backward()``.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: Nesterov's momentum.
        maximize: Ascend instead.
        foreach: As in ``torch.optim``.
        fused: As in ``torch.optim``.
        channel_clip: Largest gradient norm of a channel over the channel's own norm, as in
            :meth:`trady.Tuner.clip_gradients`; exact, for it needs no other gradient.
        max_norm: Largest norm of all gradients together, estimated during the backward pass from the running norm of
            past steps and the gradients that have arrived (docs/optimizers.md).

    Raises:
        TrainingError: ``channel_clip`` or ``max_norm`` is not positive.
        ValueError: Any other value is not possible, as in ``torch.optim``.
    """

    outer = torch.optim.SGD

    @property
    def update_forms(self) -> int:
        """One each for weight decay, Nesterov's momentum and maximising."""
        options = ("weight_decay", "nesterov", "maximize")
        return max(sum(bool(group[name]) for name in options) for group in self.param_groups)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        channel_clip: float | None = None,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach, fused=fused
        )
        self._begin(channel_clip, max_norm)


class AdamW(UpdatesInBackward, torch.optim.AdamW):
    """``torch.optim.AdamW``, bit for bit, inside the backward pass.

    Args:
        params: ``tuner.parameters()``, or parameter groups of them.
        lr: Learning rate; read when a gradient arrives, so set it before ``backward()``.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        amsgrad: Keep the largest second moment.
        maximize: Ascend instead.
        foreach: As in ``torch.optim``.
        fused: As in ``torch.optim``.
        channel_clip: As for :class:`SGD`.
        max_norm: As for :class:`SGD`.

    Raises:
        TrainingError: ``channel_clip`` or ``max_norm`` is not positive.
        ValueError: Any other value is not possible, as in ``torch.optim``.
    """

    outer = torch.optim.AdamW

    @property
    def update_forms(self) -> int:
        """The root of the second moment, the quotient, and one for maximising."""
        return max(2 + bool(group["maximize"]) for group in self.param_groups)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        channel_clip: float | None = None,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, fused=fused)
        self._begin(channel_clip, max_norm)
