"""Multiply-adds of what really runs, by the formulas of ``torch.utils.flop_counter``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.plain_kernels import without_native_kernels
from trady.ops.native import depthwise


class Counter(TorchDispatchMode):
    """Counts the operations below autograd; ``FlopCounterMode`` also hangs hooks on what the model makes."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is torch.ops.aten.convolution_backward:
            self.multiply_adds += _convolution_backward(args, out) // 2
        elif packet in flop_registry:
            self.multiply_adds += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        return out


def _convolution_backward(args: Any, out: Any) -> int:
    """The formula counts the gradient of a grouped weight as if its convolution had one group."""
    *geometry, groups, mask = args
    count = flop_registry[torch.ops.aten.convolution_backward]
    inputs = count(*geometry, groups, (mask[0], False, False), out_val=out) if mask[0] else 0
    weights = count(*geometry, groups, (False, mask[1], False), out_val=out) if mask[1] else 0
    return int(inputs + weights // groups)


def multiply_adds(run: Callable[[], object]) -> int:
    """Count what ``run`` does, in PyTorch's own kernels."""
    with without_native_kernels(depthwise), Counter() as counter:
        run()
    return counter.multiply_adds
