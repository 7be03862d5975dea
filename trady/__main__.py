"""``python -m trady`` is ``trady``."""

import os
import sys

# Python puts the current folder first, and a file that lies there, such as matplotlib.py, would be run in the place of
# a library. A model or a module that is asked for by name is still found there (trady.training.models.here).
if not getattr(sys.flags, "safe_path", False) and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
    del sys.path[0]

from trady.cli.app import app

app(prog_name="trady")
