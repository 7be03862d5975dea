"""The function mode that all others derive from: it reads a call once, in the same order for every one of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from trady.calls.canonical import canonical, transposed, transposes_weight
from trady.calls.decompositions import DECOMPOSITIONS
from trady.calls.questions import is_metadata
from trady.calls.standardised import prepares_filters, remembering, with_values


class CallMode(TorchFunctionMode):
    """Hands every call that computes something to :meth:`call`, decomposed and canonical.

    The functions of these steps exclude each other, so their order decides nothing: questions about a tensor's shape or
    kind go to :meth:`asked`; functions that hide their calls are decomposed, and the mode sees the calls inside;
    a transposed weight is remembered, so that its product can be read as a linear layer, and so is one whose filters
    are standardised for a convolution.
    """

    #: Whether the view of a transposed weight remembers its weight.
    remembers_transposes: ClassVar[bool] = True

    #: Whether a weight has been standardised for a convolution.
    _has_filters = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Read one call."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            self.compiling()
        if is_metadata(func):
            return self.asked(func, args, kwargs)
        if func in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[func](*args, **kwargs)
        if self.remembers_transposes and transposes_weight(func, args):
            return transposed(func, args, kwargs)
        if self.remembers_transposes and (filters := prepares_filters(func, args, kwargs)) is not None:
            self._has_filters = True
            return remembering(filters, func, args, kwargs)
        func, args, kwargs = canonical(func, args, kwargs)
        if self._has_filters:
            args, kwargs = with_values((args, kwargs), self.call)
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do a call that computes something, in its canonical words."""
        raise NotImplementedError

    def asked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a question about a tensor's shape or kind."""
        return func(*args, **kwargs)

    def compiling(self) -> None:
        """React to a call that ``torch.compile`` traces: modes that must see every call refuse."""
