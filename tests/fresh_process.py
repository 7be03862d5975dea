"""Programs in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from trady.process.resident import resident

linux = pytest.mark.skipif(resident() is None, reason="the system does not say what a process has in memory")


def afresh(program: str) -> Any:
    """Run a program in a process of its own; return the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
