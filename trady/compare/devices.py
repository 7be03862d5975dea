"""CUDA devices: which there are, which worker gets which, and how many cells may share them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trady.errors import MatrixError

#: The driver's variable for the devices that a process sees; read once, with the first tensor on a device.
VARIABLE = "CUDA_VISIBLE_DEVICES"

#: Of Python 3.11 and later.
SAFE_PATH = "PYTHONSAFEPATH"


def visible_devices() -> tuple[str, ...]:
    """List the CUDA devices that this process may use, as :data:`VARIABLE` names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VARIABLE)
    names = [str(number) for number in range(count)] if named is None else [n.strip() for n in named.split(",")]
    return tuple(names[:count])


def least_used(devices: Sequence[str], in_use: Sequence[str | None]) -> str | None:
    """Choose the device for one more worker; ``None`` where there is none."""
    return min(devices, key=in_use.count, default=None)


@contextmanager
def seen_by_children(device: str | None) -> Iterator[None]:
    """Let processes started inside the context see this device alone; ``None`` shows what this process sees.

    They look for Python's own modules in its own folders, not in the current one first.
    """
    given = {SAFE_PATH: "1"} if device is None else {SAFE_PATH: "1", VARIABLE: device}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_share(gpus_per_cell: float | None) -> None:
    """Refuse a share of a device that no cell can have.

    Raises:
        MatrixError: It is not above 0 and at most 1: a cell trains on one device.

    """
    if gpus_per_cell is not None and not 0 < gpus_per_cell <= 1:
        raise MatrixError(f"gpus_per_cell is {gpus_per_cell}; a cell takes more than 0 and at most 1 of a GPU")


def cells_at_a_time(gpus: float, gpus_per_cell: float, workers: int | None, wanted: int) -> int:
    """How many cells may run at a time on these GPUs.

    Args:
        gpus: GPUs that there are.
        gpus_per_cell: What each cell takes of one.
        workers: What the user asked for.
        wanted: How many to run if the user did not ask for a number.

    Raises:
        MatrixError: There is no GPU, or more workers are asked for than fit.

    """
    most = int(gpus) * int(1 / gpus_per_cell + 1e-9)
    if not most:
        raise MatrixError(f"gpus_per_cell is {gpus_per_cell}, and there is no GPU: leave it out")
    if workers is not None and workers > most:
        raise MatrixError(f"{workers} workers of {gpus_per_cell} GPUs do not fit on {gpus:g}; at most {most} do")
    return workers or min(wanted, most)
