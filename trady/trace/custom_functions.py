"""Whether a custom autograd function is running."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType

import torch


def in_custom_function() -> bool:
    """Whether a custom autograd function is running, which switches gradients off as ``no_grad`` does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_forward(frame.f_code):
        frame = frame.f_back
    return frame is not None


@lru_cache(maxsize=4096)
def _is_forward(code: CodeType) -> bool:
    """Whether code is the forward of a custom function; what calls it is no Python from torch 2.14 on."""
    return any(getattr(forward, "__code__", None) is code for forward in _forwards(torch.autograd.Function))


def _forwards(base: type) -> Iterator[object]:
    """The forward functions of all subclasses, without what decorators have put around them."""
    kinds: list[type] = type.__subclasses__(base)
    for kind in kinds:
        if "forward" in vars(kind):
            forward = vars(kind)["forward"]
            yield inspect.unwrap(getattr(forward, "__func__", forward))
        yield from _forwards(kind)
