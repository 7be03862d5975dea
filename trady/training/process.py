"""A run in a process budget: the process made ready, images out of memory, and what the process took."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader

from trady.errors import BudgetError, TradyWarning
from trady.planning.budget import Budget
from trady.planning.plan import Plan
from trady.planning.process_memory import is_process, ready_for
from trady.planning.request import Request
from trady.process.resident import Resident, resident
from trady.report.units import format_bytes
from trady.training.data.augment import as_it_is
from trady.training.data.datasets import ImageDataset, Pixels
from trady.training.data.on_disk import PixelsOnDisk

#: Images that take less stay in memory.
_IN_MEMORY_BYTES = 4 << 20


def in_process(
    request: Request, data: Iterable[Any], out: Path | None, *, resumed: Path | None, processes: int
) -> Request:
    """Make a run ready for a process budget; any other request is returned as it is.

    Args:
        request: What is asked for.
        data: Data sets or loaders; images that :func:`trady.load_data` has read go to a file.
        out: The run folder.
        resumed: The plan of the run that is resumed: what was left for a step then is left for it now, so that it
            draws the same channels.
        processes: How many processes train together.

    Raises:
        BudgetError: Several do.
        DataError: The images cannot be written.
    """
    limit = request.limit
    if limit is None or not is_process(limit):
        return request
    if processes > 1:
        raise BudgetError(f'budget "{limit}" is for one process, and {processes} train together: type a peak: budget')
    ready_for(limit)
    for each in data:
        _to_disk(as_it_is(each.dataset if isinstance(each, DataLoader) else each), _existing(out))
    known = Plan.load(resumed).budget if resumed is not None and resumed.exists() else None
    return replace(request, budget=known) if known is not None and str(known) == str(limit) else request


def process_now(budget: Budget | None, warned: bool) -> tuple[Resident | None, bool]:
    """Read what the process has in memory; warn, once, where that was ever more than a process budget.

    Args:
        budget: Of the run.
        warned: Whether it has warned.

    Returns:
        What it has, where the system says; and whether it has warned by now.
    """
    now = resident()
    if now is None or budget is None or warned or not is_process(budget) or now.peak_bytes <= budget.amount:
        return now, warned
    warnings.warn(
        f'the process took {format_bytes(now.peak_bytes)} of the budget "{budget}": what is outside of the step, such '
        "as reading data, the evaluation or an import, took more than was left. Train on smaller batches or less data, "
        "or give a larger budget",
        TradyWarning,
        stacklevel=2,
    )
    return now, True


def _to_disk(data: Any, folder: Path) -> None:
    pixels: Any = data.pixels if isinstance(data, ImageDataset) else None
    if isinstance(pixels, np.ndarray) and pixels.nbytes > _IN_MEMORY_BYTES:
        data.pixels = cast(Pixels, PixelsOnDisk(pixels, folder))


def _existing(out: Path | None) -> Path:
    """Where the run folder is, or will be: temporary folders are memory on many a board."""
    folder = Path.cwd() if out is None else out.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
