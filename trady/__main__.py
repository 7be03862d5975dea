"""``python -m trady`` is ``trady``."""

from trady.cli.app import app

app(prog_name="trady")
