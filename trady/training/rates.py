"""The learning rate of a run that is given none: one that holds for its optimizer.

Measured by ``python -m benchmarks.recipe --optimizer all`` (docs/optimizers.md has the figures).
"""

from __future__ import annotations

from typing import Literal

#: What a model reads.
Kind = Literal["images", "texts"]

#: Of plain SGD, and of optimizers of the family of Adam, whose step does not grow with the gradient.
_RATES: dict[Kind, tuple[float, float]] = {"images": (0.1, 3e-3), "texts": (0.1, 1e-3)}

#: Where every parameter trains, all move the network together: half of it serves better.
_SHARE_OF_FULL = 0.5


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
    sgd, adam = _RATES[kind]
    rate = sgd * (1 - momentum) if optimizer.startswith("sgd") else adam
    return rate * (_SHARE_OF_FULL if everything else 1.0)
