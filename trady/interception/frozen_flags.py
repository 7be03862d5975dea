"""The flags of parameters that a tuner has frozen: ``requires_grad = False``, then ``True``, gives them back.

Adversarial training freezes a whole model for a step of the other one and unfreezes it again. What does not train in a
prepared model (biases, normalisations) is not to train after that either, nor where a loop begins by unfreezing all. A
flag of one parameter that is set to true where it was not set to false before is what it says; the next forward pass
refuses it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from trady.errors import TradyWarning
from trady.model.prepared import plain_class
from trady.ops.parameter_class import note_class

#: Identities of frozen parameters whose flag was set to false since.
_set_to_false: set[int] = set()

_REQUIRES: Any = torch.Tensor.requires_grad


class FrozenFlags:
    """Watches the flags of frozen parameters, from :meth:`begin` to :meth:`end`.

    Args:
        parameters: What a tuner has frozen.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if type(p) is nn.Parameter]
        self._begun = False

    def begin(self) -> None:
        """Watch from now on."""
        self._begun = True
        for parameter in self._parameters:
            parameter.__class__ = _frozen_class(type(parameter))

    def follow(self) -> None:
        """Let everything stay frozen where all flags are set to true, and none was to false before."""
        if self._begun and self._parameters and all(map(_REQUIRES.__get__, self._parameters)):
            for parameter in self._parameters:
                _REQUIRES.__set__(parameter, False)
            warnings.warn(
                "the requires_grad flags of all frozen parameters were set to true, as loops of two models do: they "
                "stay frozen, beside the channels that train. Name modules that are to train whole as head=... in "
                "trady.prepare",
                TradyWarning,
                stacklevel=2,
            )

    def end(self) -> None:
        """Give the parameters back as they were."""
        for parameter in self._parameters if self._begun else ():
            _set_to_false.discard(id(parameter))
            parameter.__class__ = plain_class(type(parameter))
        self._begun = False


class _Frozen:
    """What a frozen parameter has in the place of :class:`torch.nn.Parameter`'s own."""

    __slots__ = ()

    @property
    def requires_grad(self) -> bool:
        flag: bool = _REQUIRES.__get__(self)
        return flag

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if not requires_grad:
            _set_to_false.add(id(self))
        if not requires_grad or id(self) not in _set_to_false:
            _REQUIRES.__set__(self, requires_grad)
        else:
            _set_to_false.discard(id(self))
        return self

    def __repr__(self) -> str:
        mine: Any = self
        return repr(nn.Parameter(mine.detach(), mine.requires_grad))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            mine: Any = self
            memo[id(self)] = nn.Parameter(mine.data.clone(memory_format=torch.preserve_format), mine.requires_grad)
            vars(memo[id(self)]).update(copy.deepcopy(vars(mine), memo))
        return memo[id(self)]


@lru_cache(maxsize=8)
def _frozen_class(kind: type[nn.Parameter]) -> type[nn.Parameter]:
    metaclass: Any = type(kind)
    made: type[nn.Parameter] = metaclass(
        kind.__name__, (_Frozen, kind), {"__slots__": (), "__module__": kind.__module__}
    )
    note_class(made, kind)
    return made
