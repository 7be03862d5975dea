"""A batch normalisation whose statistics are fixed: a scale and a shift of each channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrozenNorm:
    """Running statistics and parameters of a batch normalisation, ``[channels]`` each."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return ``weight / sqrt(variance + epsilon)`` and ``bias - mean * scale``."""
        # Made once and kept, maybe during an evaluation: tensors of inference mode could not be trained with.
        with torch.inference_mode(False), torch.no_grad():
            scale = torch.rsqrt(self.variance + self.epsilon)
            if self.weight is not None:
                scale = scale * self.weight
            shift = -self.mean * scale
            return scale, shift if self.bias is None else shift + self.bias
