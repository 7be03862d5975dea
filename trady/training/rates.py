"""The optimizer of a run that is given none, and a learning rate that holds for its optimizer.

Measured on images by ``python -m benchmarks.recipe --optimizer all`` (docs/optimizers.md has the figures), on texts by
``python -m benchmarks.paper.sentences``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


_CHANNELS = "channels"

#: Where chosen channels train, and where another policy has rates of its own: where every parameter trains, all move
#: the network together.
_RATES: dict[Kind, Mapping[str, _Rates]] = {
    "images": {_CHANNELS: _Rates(0.1, 3e-3), "full": _Rates(0.05, 5e-4)},
    "texts": {_CHANNELS: _Rates(0.1, 2e-3), "full": _Rates(0.05, 1e-4), "head": _Rates(0.1, 3e-3)},
}

#: Plain SGD for convolutional networks, as the paper has it; transformers hardly move by it in a few hundred steps.
_OPTIMIZERS: dict[Kind, str] = {"images": "sgd", "texts": "adamw"}


def kind_of(data: Any) -> Kind:
    """What a model reads that is trained on a data set, or on a loader of one."""
    kind: Kind = getattr(getattr(data, "dataset", data), "kind", "images")
    return kind


def usual_optimizer(kind: Kind) -> str:
    """Return the optimizer of a run that is given none."""
    return _OPTIMIZERS[kind]


def usual_rate(
    optimizer: object, momentum: float = 0.0, *, policy: str = _CHANNELS, kind: Kind = "images"
) -> float | None:
    """Return the rate at the end of the warm-up that an optimizer trains well with; ``None`` for somebody's own.

    Args:
        optimizer: Its name on the command line, or a function that makes one.
        momentum: A gradient is added up over 1 / (1 - momentum) steps, so the rate is divided by that.
        policy: Name of the policy.
        kind: What the model reads.
    """
    if not isinstance(optimizer, str):
        return None
    rates = _RATES[kind].get(policy, _RATES[kind][_CHANNELS])
    return rates.sgd * (1 - momentum) if optimizer.startswith("sgd") else rates.adam
