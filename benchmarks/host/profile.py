"""Where the time of a step goes: Python's own profiler, its functions put together by what they are for."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trady

#: By package of trady, what its code does in a step.
_PARTS = {
    "calls": "recognition",
    "interception": "bookkeeping",
    "analysis": "bookkeeping",
    "model": "bookkeeping",
    "trace": "bookkeeping",
    "quantized": "bookkeeping",
    "ops": "lean operations",
    "optim": "updates",
    "tuner": "write-back and watching",
}

PYTORCH, AUTHOR = "PyTorch", "the model"

#: In the order of the table.
PARTS = (*dict.fromkeys(_PARTS.values()), "the rest of trady", PYTORCH, AUTHOR)

_ROOT = Path(trady.__file__).parent

#: A function in a profile: file, line, name.
_Function = tuple[str, int, str]


def where_it_goes(step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Profile a step; return milliseconds of a step by part, those of :data:`PARTS`.

    The profiler itself makes Python code two to three times slower and kernels not at all: shares are to be compared,
    not summed up to a time.

    Args:
        step: What to profile; it has warmed up.
        rounds: Steps.

    """
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(rounds):
        step()
    profiler.disable()
    seconds = dict.fromkeys(PARTS, 0.0)
    profile: Any = pstats.Stats(profiler)
    statistics: Mapping[_Function, tuple[int, int, float, float, Mapping[_Function, tuple[int, int, float, float]]]]
    statistics = profile.stats
    for function, (_, _, own, _, callers) in statistics.items():
        part = _part(function)
        if part is not None:
            seconds[part] += own
            continue
        for caller, (_, _, share, _) in callers.items():  # a builtin of Python costs whoever calls it
            seconds[_part(caller) or PYTORCH] += share
    return {part: total / rounds * 1e3 for part, total in seconds.items()}


def _part(function: _Function) -> str | None:
    file, _, name = function
    if file == "~":
        return PYTORCH if "torch" in name or "run_backward" in name else None
    path = Path(file)
    if path.is_relative_to(_ROOT):
        return _PARTS.get(path.relative_to(_ROOT).parts[0], "the rest of trady")
    return PYTORCH if "torch" in path.parts else AUTHOR
