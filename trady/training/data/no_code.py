"""Data sets of the Hub whose own code never runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def no_code(load: Callable[..., Any]) -> dict[str, bool]:
    """Return the option that keeps a data set's own code from running, where a version still has it."""
    return {"trust_remote_code": False} if "trust_remote_code" in inspect.signature(load).parameters else {}
