"""The floor of a step's time: a forward pass and the gradient of the input, with every weight frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from benchmarks.tasks import Task


@contextmanager
def input_gradients(task: Task) -> Iterator[Callable[[], None]]:
    """Give a step that computes the gradient of the batch.

    Token ids can have none; there it is the gradient of what the first embedding makes of them.
    """
    leaves: list[Tensor] = []

    def require(module: nn.Module, arguments: object, output: Tensor) -> None:
        leaves.append(output.requires_grad_(True))

    handle = None
    if isinstance(task.batch, Tensor):
        leaves.append(task.batch.requires_grad_(True))
    else:
        embedding = next(module for module in task.model.modules() if isinstance(module, nn.Embedding))
        handle = embedding.register_forward_hook(require)

    def run() -> None:
        task.run().backward()
        leaves[-1].grad = None
        if handle is not None:
            leaves.clear()

    try:
        yield run
    finally:
        if handle is not None:
            handle.remove()
