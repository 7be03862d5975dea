"""The learning rate of a run that is given none: one that holds for its optimizer.

Measured by ``python -m benchmarks.recipe --optimizer all`` (docs/optimizers.md has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What a model reads.
Kind = Literal["images", "texts"]


@dataclass(frozen=True)
class _Rates:
    """Rates at the end of the warm-up.

    Attributes:
        sgd: Of plain SGD.
        adam: Of Adam and AdamW, whose step does not grow with the gradient.
    """

    sgd: float
    adam: float


#: Where chosen channels train, and where every parameter does: then all move the network together.
_CHANNELS: dict[Kind, _Rates] = {"images": _Rates(0.1, 3e-3), "texts": _Rates(0.1, 1e-3)}
_EVERYTHING: dict[Kind, _Rates] = {"images": _Rates(0.05, 5e-4), "texts": _Rates(0.05, 1e-4)}


def usual_rate(
    optimizer: object, momentum: float = 0.0, *, everything: bool = False, kind: Kind = "images"
) -> float | None:
    """Return the rate at the end of the warm-up that an optimizer trains well with; ``None`` for somebody's own.

    Args:
        optimizer: Its name on the command line, or a function that makes one.
        momentum: A gradient is added up over 1 / (1 - momentum) steps, so the rate is divided by that.
        everything: Whether every parameter trains (policy ``full``), not chosen channels.
        kind: What the model reads.
    """
    if not isinstance(optimizer, str):
        return None
    rates = (_EVERYTHING if everything else _CHANNELS)[kind]
    return rates.sgd * (1 - momentum) if optimizer.startswith("sgd") else rates.adam
