"""A CUDA graph without a GPU: it runs its pass again, on the memory that it was recorded with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class SimulatedGraph:
    """Stands for a CUDA graph: ``replay`` writes to the tensors that ``record`` returned and left in ``.grad``."""

    made: list[SimulatedGraph]

    def __init__(self, trained: Callable[[], list[nn.Parameter]]) -> None:
        self._trained, self.replays = trained, 0
        SimulatedGraph.made.append(self)

    def record(self, run: Callable[[], Any]) -> Any:
        self._run, self._parameters = run, self._trained()
        self._result = run()
        self._gradients = [p.grad for p in self._parameters]
        return self._result

    def replay(self) -> None:
        self.replays += 1
        held = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        with torch.enable_grad():
            self._result.data.copy_(self._run().detach())
        for parameter, gradient, before in zip(self._parameters, self._gradients, held, strict=True):
            if gradient is not None:
                assert parameter.grad is not None
                gradient.copy_(parameter.grad)
            parameter.grad = before
