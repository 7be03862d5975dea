"""``python -m trady`` is ``trady``."""

from trady.cli import app

app(prog_name="trady")
