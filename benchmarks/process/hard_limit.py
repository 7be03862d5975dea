"""Commands under a hard limit of memory: a group of the kernel's (cgroup), which kills what exceeds it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trady.errors import TrainingError

_ROOT = Path("/sys/fs/cgroup")

#: Of both versions of the kernel's interface: where the limit, swap's limit and the highest use are.
_FILES = {
    1: ("memory.limit_in_bytes", None, "memory.max_usage_in_bytes"),
    2: ("memory.max", "memory.swap.max", "memory.peak"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        killed: Whether the kernel killed it.
        code: Its exit code.
        group_peak_bytes: The most that the kernel charged: anonymous memory, and files that this group read first.
        output: Its standard output.
        errors: The end of its standard error.
        seconds: How long it ran.
    """

    killed: bool
    code: int
    group_peak_bytes: int
    output: str
    errors: str
    seconds: float


def run_limited(command: Sequence[str], limit_bytes: int, environment: Mapping[str, str]) -> Outcome:
    """Run a command in a group of its own that may use so much memory, and no swap.

    Raises:
        TrainingError: No group can be made here: that takes root, or a delegated group.
    """
    with _group(limit_bytes) as (group, peak), tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        procs = group / "cgroup.procs"
        started = time.perf_counter()
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh", *command],
            stdout=out,
            stderr=err,
            env=dict(environment),
            check=False,
        )
        seconds = time.perf_counter() - started
        out.seek(0), err.seek(0)
        highest = int((group / peak).read_text())
        return Outcome(
            done.returncode == -signal.SIGKILL, done.returncode, highest, out.read(), err.read()[-500:], seconds
        )


@contextlib.contextmanager
def _group(limit_bytes: int) -> Iterator[tuple[Path, str]]:
    version, parent = _parent()
    limit, swap, peak = _FILES[version]
    group = parent / f"trady-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
        if swap is not None and (group / swap).exists():
            (group / swap).write_text("0")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise TrainingError(
            f"no memory group can be made in {parent} ({error}): run this as root, or in a group that is delegated to "
            "you (systemd-run --user --scope -p Delegate=yes …)"
        ) from error
    try:
        yield group, peak
    finally:
        group.rmdir()


def _parent() -> tuple[int, Path]:
    """The group of this process, so that what limits it goes on to do so."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return 1, _ROOT / "memory" / path.lstrip("/")
        if not controllers and (_ROOT / "cgroup.controllers").exists():
            return 2, _ROOT / path.lstrip("/")
    raise TrainingError("this system has no memory groups (cgroup): the runs under a hard limit need Linux")
