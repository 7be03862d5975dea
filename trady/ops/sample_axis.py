"""Where the samples of a batch lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleAxis:
    """The dimension in which samples lie, one behind another.

    Attributes:
        dim: The dimension.
        per_sample: Its size for one sample: windows, for instance, or tokens of a flattened sequence.
    """

    dim: int
    per_sample: int
