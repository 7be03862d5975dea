"""One inference pass of the untouched model, measured: the reference for a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from trady.memory.live import LiveBytes
from trady.memory.modules import Call, given_tensors
from trady.model.parameters import own_parameters
from trady.model.untouched import untouched as kept


def inference_peak(
    model: nn.Module,
    call: Call,
    *,
    device: str | None = None,
    untouched: Callable[[], AbstractContextManager[object]],
) -> int:
    """Highest live tensor bytes of one pass in eval mode without gradients, weights and batch included.

    The model and the random number generators are restored afterwards.

    Args:
        model: The model.
        call: How the training step called it.
        device: Count only this type of device.
        untouched: Makes the context in which the model is as its author wrote it.
    """
    live = LiveBytes()
    with ExitStack() as stack:
        args, kwargs = call.again()
        stack.enter_context(kept(model, args, kwargs))
        for module in model.modules():  # one by one: a model's own train() may do arithmetic on its weights
            module.training = False
        stack.enter_context(untouched())
        for kind, dtype in call.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        live.register([*own_parameters(model), *model.buffers()], "weights")
        live.register(given_tensors((args, kwargs)), "inputs")
        # The user did not ask for this pass, so its warnings would confuse (checkpoints without gradients, …).
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(live)
        model(*args, **kwargs)
    return live.highest(lambda storage: device is None or storage.device == device)[0]
