"""A method that a workload leaves out."""

from trady.errors import TradyError


class SkippedError(TradyError):
    """A method that this network has nothing for; the message says why."""
