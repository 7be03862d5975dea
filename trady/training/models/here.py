"""The current folder, importable for as long as a person's own module is imported and called, and no longer.

Otherwise a file that happens to lie there, such as ``matplotlib.py``, would be run in the place of a library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def importable_here() -> Iterator[None]:
    """Look for modules in the current folder first, as Python does for a script that lies there."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
