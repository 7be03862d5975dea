"""What can go wrong, in one family: every message says what was given and what to do."""


class TradyError(Exception):
    """The root of every error trady raises on purpose."""


class BudgetError(TradyError, ValueError):
    """A budget that cannot be read, or that nothing fits in."""


class ModelError(TradyError, ValueError):
    """A model or an example batch that cannot be traced, armed or trained."""


class PolicyError(TradyError, ValueError):
    """A policy that does not exist or that drew channels it may not draw."""


class RankingError(TradyError, ValueError):
    """A layer ranking that cannot be read or that belongs to another model."""


class StateError(TradyError, RuntimeError):
    """A call that comes too early, too late, or twice."""


class LockedError(StateError):
    """A folder that another process works in."""


class CheckpointError(TradyError, ValueError):
    """A checkpoint or delta that is damaged, of another model or of another version."""


class DataError(TradyError, ValueError):
    """A data set that cannot be read, or labels that the model cannot have."""


class TrainingError(TradyError, RuntimeError):
    """A run that stopped because going on would have spoilt the model."""


class MatrixError(TradyError, ValueError):
    """A matrix of runs with mistakes, all of them in the message."""


class FileError(TradyError, OSError):
    """A file or folder that cannot be read or written, whatever it holds."""


class ResourceError(TradyError, OSError):
    """Disk or memory ran out; the command line ends with code 3, and what was complete before still is."""


class TradyWarning(UserWarning):
    """Something that goes on, but not as it was planned."""
