"""The kinds of calls that trady knows: one file a kind, all that is known of it inside.

A new lean operation is such a file and its name in :data:`KINDS`; a kind of one's own is registered by
:func:`trady.calls.recognize.register`.
"""

from __future__ import annotations

from typing import Any

from trady.calls.kind import Call, CallKind
from trady.calls.kinds.activation import ACTIVATION, ActivationCall
from trady.calls.kinds.average_pool import AVERAGE_POOL
from trady.calls.kinds.dropout import DROPOUT
from trady.calls.kinds.loss import LOSS, LossCall
from trady.calls.kinds.max_pool import MAX_POOL
from trady.calls.kinds.norm import NORM, NormCall
from trady.calls.kinds.pad import PAD, PadCall
from trady.calls.kinds.recurrence import RECURRENCE, RecurrentCall
from trady.calls.kinds.smooth import SMOOTH
from trady.calls.kinds.weight import WEIGHT, WeightCall

#: Every kind that is recognised from the start; the order does not matter.
KINDS: tuple[CallKind[Any], ...] = (
    WEIGHT,
    RECURRENCE,
    NORM,
    ACTIVATION,
    PAD,
    MAX_POOL,
    AVERAGE_POOL,
    DROPOUT,
    SMOOTH,
    LOSS,
)

__all__ = ["KINDS", "ActivationCall", "Call", "LossCall", "NormCall", "PadCall", "RecurrentCall", "WeightCall"]
