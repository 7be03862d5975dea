"""Lengths of time as people type them: ``10min``, ``90 s``, ``1.5h``."""

from __future__ import annotations

import math
import re

from trady.errors import TrainingError

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def parse_seconds(given: str | float, what: str) -> float:
    """Return a length of time in seconds.

    Args:
        given: A number of seconds, or a number with ``s``, ``min`` or ``h``.
        what: What it is for, for the message.

    Raises:
        TrainingError: It cannot be read, or is not more than zero.
    """
    if isinstance(given, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*", given.lower())
        factor = None if found is None else _UNITS.get(found[2])
        if found is None or factor is None:
            raise TrainingError(f'{what} is {given!r}; give a number with s, min or h, such as "10min"')
        seconds = float(found[1]) * factor
    else:
        seconds = float(given)
    if not (math.isfinite(seconds) and seconds > 0):
        raise TrainingError(f"{what} is {given!r}; give a time that is more than zero")
    return seconds
