"""Optimizers that update a layer inside the backward pass; clipping channel by channel."""

from trady.optim.in_backward import SGD, AdamW, UpdatesInBackward, update_forms

__all__ = ["SGD", "AdamW", "UpdatesInBackward", "update_forms"]
