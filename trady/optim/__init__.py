"""Optimizers that update a layer inside the backward pass; clipping channel by channel."""

from trady.optim.in_backward import SGD, AdamW, UpdatesInBackward

__all__ = ["SGD", "AdamW", "UpdatesInBackward"]
