"""Native kernels set aside: what is computed then is plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def without_native_kernels(module: ModuleType) -> Iterator[None]:
    """``module`` asks for the library of kernels by this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "library", lambda: None)
        yield
