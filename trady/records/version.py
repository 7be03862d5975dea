"""Which trady this is: what records name as their writer, and ``trady.__version__``."""

__version__ = "0.1.0"
