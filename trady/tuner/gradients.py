"""What happens to the gradients of selected channels when they arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_host(norms: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy the norms of every layer to the host at once: an accelerator is waited for once, not layer by layer."""
    first = next(iter(norms.values()))
    together = torch.cat([values.to(first.device) for values in norms.values()]).cpu()
    parts = together.split([len(values) for values in norms.values()])
    return {name: part.numpy() for name, part in zip(norms, parts, strict=True)}
