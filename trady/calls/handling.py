"""What the computation of a call may ask of the armed model, and what it has to tell it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from trady.calls.actions import Action
from trady.errors import ModelError
from trady.ops.context import current_operation
from trady.ops.frozen_norm import FrozenNorm
from trady.ops.parameter_class import is_parameter_class
from trady.ops.selected import DenseWeight, SelectedChannels
from trady.quantized.linear import QuantizedLinear


class TrainedLayer(Protocol):
    """A layer that can be updated by input channel."""

    @property
    def name(self) -> str:
        """Its name in the channel table."""

    @property
    def truth(self) -> DenseWeight | QuantizedLinear:
        """What its channels are read from and written to."""

    @property
    def selected(self) -> SelectedChannels | None:
        """The channels that train now; ``None`` when none does."""

    @property
    def leaf(self) -> Tensor | None:
        """Their values as a leaf of the graph."""


class Handling(Protocol):
    """One call that is being computed in an armed model."""

    @property
    def action(self) -> Action | None:
        """How the plan wants it computed; ``None`` is on its own."""

    @property
    def graph_only(self) -> bool:
        """Whether nobody reads the values of its result, only its graph is needed."""

    @property
    def fidelity(self) -> str:
        """``exact``, or the bits in which smooth activations keep their derivative (trady.ops.smooth.FIDELITIES)."""

    @property
    def watched(self) -> bool:
        """Whether somebody wants to hear of layers: :meth:`ran`."""

    def in_head(self, *parameters: Tensor | None) -> bool:
        """Whether any of the parameters trains through PyTorch's own backward."""

    def layer_of(self, weight: Tensor) -> TrainedLayer | None:
        """The layer of a weight, if it can be updated by input channel."""

    def scale_and_shift(self, norm: FrozenNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift of a frozen normalisation, ``[channels]`` each."""

    def commit(self) -> None:
        """Say that a value was put off or overwritten: from here on, the forward pass must follow the plan."""

    def ran(self, layer: TrainedLayer, out: Tensor) -> None:
        """Say that a layer has been computed, and hand over its result."""


#: The flag itself, which classes of parameters may hide behind Python code.
_requires_grad: Any = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def any_trains(*parameters: Tensor | None) -> bool:
    """Whether any of the parameters requires a gradient."""
    return any([parameter is not None and _requires_grad(parameter) for parameter in parameters])  # noqa: C419 - faster


def constant(weight: Tensor) -> Tensor:
    """The weight of a layer whose channels train, as it is in a forward pass; that may run inside a backward pass."""
    return weight.detach() if weight.requires_grad else weight


def refuse_trained(*parameters: Tensor | None) -> None:
    """Refuse parameters that were made trainable after the model had been prepared.

    Raises:
        ModelError: One of them requires a gradient.

    """
    if any_trains(*parameters):
        raise ModelError(_MADE_TRAINABLE)


_MADE_TRAINABLE = (
    "a parameter of the model was made trainable after it had been prepared: set requires_grad_(False) again, or call "
    "tuner.finish() and prepare with its module as head=..., where it is to train whole; the channels of a layer train "
    "without its bias"
)


class labelled:  # noqa: N801 - a context manager, which a class makes cheaper than a generator
    """Context in which what is saved is accounted to an operation."""

    __slots__ = ("_operation", "_token")

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def __enter__(self) -> None:
        self._token = current_operation.set(self._operation)

    def __exit__(self, *exception: object) -> None:
        current_operation.reset(self._token)


def may_be_overwritten(x: Tensor) -> bool:
    """Whether a plain tensor shares its memory with none, so that a model may ask to overwrite it."""
    return (
        (type(x) is Tensor or is_parameter_class(type(x))) and not x._is_view() and not (x.is_leaf and x.requires_grad)
    )
