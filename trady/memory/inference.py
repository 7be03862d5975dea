"""One inference pass of the untouched model, measured: the reference for a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from trady.memory.live import LiveBytes
from trady.memory.modules import Call, given_tensors


def inference_peak(
    model: nn.Module,
    call: Call,
    *,
    device: str | None = None,
    untouched: Callable[[], AbstractContextManager[object]],
) -> int:
    """Highest live tensor bytes of one pass in eval mode without gradients, weights and batch included.

    Training flags, buffers and random number generators are restored afterwards.

    Args:
        model: The model.
        call: How the training step called it.
        device: Count only this type of device.
        untouched: Makes the context in which the model is as its author wrote it.
    """
    live = LiveBytes()
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        stack.enter_context(untouched())
        for kind, dtype in call.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        args, kwargs = call.again()
        live.register([*model.parameters(), *model.buffers()], "weights")
        live.register(given_tensors((args, kwargs)), "inputs")
        # The user did not ask for this pass, so its warnings would confuse (checkpoints without gradients, …).
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(live)
        model(*args, **kwargs)
    return live.highest(lambda storage: device is None or storage.device == device)[0]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; everything is restored afterwards."""
    # Flags one by one: a model's own train() may do more, such as merging adapters.
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module, was in training.items():
                module.training = was
            with torch.no_grad():
                for module, name, buffer, version, copy in buffers:
                    module._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(copy)
