"""``trady`` as a process, and in this process where the process is not the point."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner

from trady.cli.app import app

MODEL = "tests.small_task:small_net"


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "trady", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def trady_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same command line, without the seconds that a process takes to import PyTorch."""
    given = [*map(str, arguments)]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "100", "NO_COLOR": "1"})
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    return subprocess.CompletedProcess(given, shown.exit_code, shown.stdout, shown.stderr)


def trady_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
