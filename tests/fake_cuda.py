"""CUDA tensors without a GPU: shapes, types and devices, no memory. For a process of its own.

``FakeTensorMode`` refuses operations on tensors of different devices, as CUDA does; ``fake_cuda.cpp``, loaded before
PyTorch, makes autograd run backward passes on a thread of the device's own, as it does for CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trady.ops import quantized

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class Waits(TorchDispatchMode):
    """Counts what would wait for the device: values that are asked for, and copies from host to device and back.

    Attributes:
        seen: What it was, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer in place of tensors that have no values."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in given)
        if func is _aten._local_scalar_dense.default and on_device:
            self.seen.append("value")
            return 1.0 if args[0].is_floating_point() else 0
        if func is _aten.equal.default and not on_device:  # states of generators
            return True
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (
            isinstance(out, torch.Tensor)
            and func in _COPIES
            and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        ):
            kinds = {tensor.device.type for tensor in (*given, out)}
            if {"cpu", "cuda"} <= kinds:
                self.seen.append(f"copy to {out.device.type}")
        return out


@contextmanager
def fake_cuda(patch: Any) -> Iterator[Waits]:
    """Make tensors on ``cuda`` possible in here; ``patch`` is pytest's monkeypatch."""
    dense = quantized.is_quantized
    for module in [m for name, m in sys.modules.items() if name.startswith("trady")]:
        if getattr(module, "is_quantized", None) is dense:
            patch.setattr(module, "is_quantized", lambda w: not isinstance(w, FakeTensor) and dense(w))
    state = torch.zeros(16, dtype=torch.uint8)
    patch.setattr(torch.cuda, "get_rng_state", lambda *_: state)
    patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    patch.setattr(torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30))
    patch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    patch.setattr(FakeTensor, "numpy", lambda self: np.ones(tuple(self.shape), dtype=np.float32), raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits
